#!/bin/sh
# numba 0.65.1 beside numpy 2.3.5: arrays that are changed in place by a view of themselves. numpy looks whether the two share memory and
# takes a copy if so. numba does that for an assignment and not for `x[1:] += x[:-1]`, `x += x.T` or `np.add(..., out)`: these read
# what they have just written, so a matrix plus its transpose is not symmetric, and sums of neighbours are running sums. With
# parallel=True the assignment is lost, too, and the answer hangs on the number of threads. No error, no warning, no fastmath.
# Written out as `x[1:] = x[1:] + x[:-1]` it is right.
#
# Seen, for 1 to 8, and 1 to 9 in three rows (what parallel=True makes of it with two threads):
#   x[1:] = x[:-1]           njit right, parallel wrong: 1 1 1 1 1 5 5 5, not 1 1 2 3 4 5 6 7
#   x[1:] += x[:-1]          njit wrong: 1 3 6 10 15 21 28 36, not 1 3 5 7 9 11 13 15, parallel wrong
#   x[1:] = x[1:] + x[:-1]   njit right, parallel right
#   x += x.T                 njit wrong: 2 6 10 10 10 14 17 22 18, not 2 6 10 6 10 14 10 14 18, parallel wrong

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" NUMBA_CACHE_DIR="$dir/numba" NUMBA_NUM_THREADS=2
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile numba==0.65.1 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import numpy as np
from numba import njit


def assigned(x):
    x[1:] = x[:-1]


def added(x):
    x[1:] += x[:-1]


def written_out(x):
    x[1:] = x[1:] + x[:-1]


def transposed(x):
    x += x.T


CASES = [  # what it is, how many numbers, is njit right, is njit(parallel=True)
    (assigned, "x[1:] = x[:-1]", (8,), True, False),
    (added, "x[1:] += x[:-1]", (8,), False, False),
    (written_out, "x[1:] = x[1:] + x[:-1]", (8,), True, True),
    (transposed, "x += x.T", (3, 3), False, False),
]


def after(function, shape):
    x = np.arange(1.0, np.prod(shape) + 1).reshape(shape)
    function(x)
    return " ".join(f"{number:g}" for number in x.flatten())


for function, name, shape, *expected in CASES:
    plain, told, seen = after(function, shape), [], []
    for how, compiled in (("njit", njit(function)), ("parallel", njit(parallel=True)(function))):
        result = after(compiled, shape)
        seen.append(result == plain)
        wrong = "wrong" if not all(seen[:-1]) else f"wrong: {result}, not {plain}"
        told.append(f"{how} {'right' if seen[-1] else wrong}")
    print(f"{name:24}", ", ".join(told))
    assert seen == expected, (name, seen)
PY
"$python" "$dir/case.py"
