#!/bin/sh
# Triton 3.8.0, tl.sort: a NaN is not sorted to an end but lost, and another value stands twice. In each exchange both places
# decide for themselves by `x > y`, which is false for both with a NaN: one keeps its value, the other takes the same. Run in
# the interpreter; compiled for sm_90 the comparisons are the same ordered ones (cmpf ogt). torch.sort puts NaN last, tl.max
# leaves it out.
#
# Seen:
#   input:      [3.0, 2.0, nan, 1.0, 0.0, 7.0, 5.0, 4.0]
#   tl.sort:    [0.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
#   torch.sort: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, nan]
#   tl.max:     7.0
#   compiled, comparisons of floats: ogt

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" TRITON_CACHE_DIR="$dir/triton"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile triton==3.8.0 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def sort(x, out):
    where = tl.arange(0, 8)
    values = tl.load(x + where)
    tl.store(out + where, tl.sort(values))
    tl.store(out + 8, tl.max(values, 0))


if triton.knobs.runtime.interpret:
    x = torch.tensor([3, 2, float("nan"), 1, 0, 7, 5, 4])
    out = torch.empty(9)
    sort[(1,)](x, out)
    print("input:     ", x.tolist())
    print("tl.sort:   ", out[:8].tolist())
    print("torch.sort:", x.sort().values.tolist())
    print("tl.max:    ", out[8].item())
    assert not out[:8].isnan().any() and out[:8].tolist() == [0, 1, 1, 2, 3, 4, 5, 7]
    assert x.sort().values[-1].isnan()
else:
    source = ASTSource(sort, {"x": "*fp32", "out": "*fp32"})
    ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    kinds = set(re.findall(r"arith\.cmpf (\w+)", ttir))
    print("compiled, comparisons of floats:", *kinds)
    assert kinds == {"ogt"}
PY
TRITON_INTERPRET=1 "$python" "$dir/case.py"
"$python" "$dir/case.py"
