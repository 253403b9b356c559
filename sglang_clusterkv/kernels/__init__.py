"""One folder per operation: `reference.py` is the definition in torch, `cpu.py` a numba version where it pays."""
