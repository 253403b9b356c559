#!/bin/sh
# numba 0.65.1 beside numpy 2.3.5: x.mean(), x.sum() and x.std() of a float32 array add one element after the other in
# float32, where numpy adds pairwise. From 2^24 equal elements on the sum stands still: the mean of 2^25 ones is a half, and
# their standard deviation too. No flag is needed for this, and fastmath is off.
#
# Seen:
#   sum, mean, std of 2^25 ones
#   numpy: (33554432.0, 1.0, 0.0)
#   numba: (16777216.0, 0.5, 0.5)

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile numba==0.65.1 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import numpy as np
from numba import njit


@njit
def statistics(x):
    return x.sum(), x.mean(), x.std()


ones = np.ones(2**25, np.float32)
compiled = tuple(float(value) for value in statistics(ones))
plain = tuple(float(value) for value in statistics.py_func(ones))
print("sum, mean, std of 2^25 ones")
print("numpy:", plain)
print("numba:", compiled)
assert plain == (2.0**25, 1.0, 0.0)
assert compiled == (2.0**24, 0.5, 0.5)
PY
"$python" "$dir/case.py"
