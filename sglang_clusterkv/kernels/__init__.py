"""The arithmetic of a step and of a build: one folder per operation, and beside them what several share.

In a folder, `reference.py` is the definition in torch, `cpu.py` a numba version where it pays, and `triton.py`, or the files of
`triton/`, the version for a GPU; `__init__.py` chooses by device. A step is the chain in `decode/`: score, select, refine,
attend, estimate, merge. A build is kmeans, then encode. A prefill on a CPU is extend. What moves between the tiers is tier.

What CPU kernels share:
    cpu_math.py          bf16, packed bits, exponentials and products, built so that loops vectorise
    row_cpu.py           rows of the index and of the pool, as float32
    threshold_cpu.py     a weighted top-k without a sort
What Triton kernels share:
    triton_rows.py       rows and codes of the index, unpacked
    triton_softmax.py    the online softmax, and how a part of an attention is left
    triton_threshold.py  a weighted top-k without a sort
    triton_tier.py       keys and values of either tier
    workspace.py         what the launches of a layer hand to each other
    grids.py             how many programs they have
    compile_case.py      what their machine code must look like
"""
