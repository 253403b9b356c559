#!/bin/sh
# numba 0.65.1 beside numpy 2.3.5: cumsum and cumprod of unsigned integers stay in the type of the array, though those of signed
# ones and of bool become int64, as numpy's do (uint64 for unsigned ones). np.sum does widen both, so the end of a list of
# offsets is not the sum of its sizes: 300 pages of one token each in uint8 end at 44, cluster sizes in uint16 wrap at 65,536
# tokens, uint32 at 4 Gi. No warning, no fastmath, and the Python of the same line is right.
#
# Seen, of 300 ones (and of 70,000 in uint16):
#   int8    np.cumsum int64, ends at 300; np.sum 300
#   uint8   np.cumsum uint8, ends at 44; np.sum 300
#   uint16  np.cumsum uint16, ends at 4464; np.sum 70000
#   uint32  np.cumsum uint32, ends at 300; np.sum 300
#   bool    np.cumsum int64, ends at 300; np.sum 300

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" NUMBA_CACHE_DIR="$dir/numba"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile numba==0.65.1 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import numpy as np
from numba import njit


def offsets(sizes):
    return np.cumsum(sizes), np.cumprod(sizes), np.sum(sizes)


CASES = [  # type, how many ones, the type and the end of numba's cumsum
    ("int8", 300, "int64", 300),
    ("uint8", 300, "uint8", 300 - 256),
    ("uint16", 70000, "uint16", 70000 - 65536),
    ("uint32", 300, "uint32", 300),
    ("bool", 300, "int64", 300),
]
compiled = njit(offsets)
for kind, number, expected, end in CASES:
    sizes = np.ones(number, dtype=kind)
    ends, products, total = compiled(sizes)
    print(f"{kind:7} np.cumsum {ends.dtype}, ends at {ends[-1]}; np.sum {total}")
    assert (ends.dtype, products.dtype, ends[-1], total) == (expected, expected, end, number)
    plain = offsets(sizes)
    assert plain[0][-1] == plain[2] == number and plain[0].dtype.itemsize == 8
PY
"$python" "$dir/case.py"
