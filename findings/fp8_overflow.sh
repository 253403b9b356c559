#!/bin/sh
# torch 2.13.0, ml-dtypes 0.6.0, Triton 3.8.0: casts of the same fp32 values to fp8 agree in no two of them. Beyond the range
# torch's e4m3fn saturates, infinity too, and ml-dtypes' is NaN; e5m2 is infinity in both, but Triton compiles both types to
# saturating instructions (cvt.rn.satfinite). Triton's interpreter does neither: it rounds without a carry into the exponent,
# so that 1.99999 is stored as 1, and in e4m3fn infinity becomes 256 and NaN becomes 384.
#
# Seen:
#   torch.float8_e4m3fn
#     torch                       2      448      448      448      nan
#     ml-dtypes                   2      nan      nan      nan      nan
#     Triton, interpreted         1      256      nan      256      384
#   torch.float8_e5m2
#     torch                       2      512      inf      inf      nan
#     ml-dtypes                   2      512      inf      inf      nan
#     Triton, interpreted         1      256      inf      inf      nan
#   Triton, compiled for sm_90
#     fp8e4nv              cvt.rn.satfinite.e4m3x2.f32
#     fp8e5                cvt.rn.satfinite.e5m2x2.f32

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" TRITON_CACHE_DIR="$dir/triton"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0 ml-dtypes==0.6.0
"$python" -m pip install --quiet --no-compile triton==3.8.0

cat >"$dir/case.py" <<'PY'
import re

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

VALUES = [1.99999, 500.0, 1e6, float("inf"), float("nan")]


@triton.jit
def cast(x, out, N: tl.constexpr):
    where = tl.arange(0, N)
    tl.store(out + where, tl.load(x + where))


def show(who, values):
    print(f"  {who:20}", *(f"{value:>8g}" for value in values))
    return [str(value) for value in values]


if triton.knobs.runtime.interpret:
    x = torch.tensor(VALUES + [0.0] * 3)
    for dtype, other, expected in (
        (
            torch.float8_e4m3fn,
            ml_dtypes.float8_e4m3fn,
            (
                ["2.0", "448.0", "448.0", "448.0", "nan"],
                ["2.0", "nan", "nan", "nan", "nan"],
                ["1.0", "256.0", "nan", "256.0", "384.0"],
            ),
        ),
        (
            torch.float8_e5m2,
            ml_dtypes.float8_e5m2,
            (
                ["2.0", "512.0", "inf", "inf", "nan"],
                ["2.0", "512.0", "inf", "inf", "nan"],
                ["1.0", "256.0", "inf", "inf", "nan"],
            ),
        ),
    ):
        out = torch.empty(8, dtype=dtype)
        cast[(1,)](x, out, 8)
        print(dtype)
        seen = (
            show("torch", x.to(dtype).float().tolist()[:5]),
            show("ml-dtypes", np.array(VALUES, np.float32).astype(other).astype(np.float32).tolist()),
            show("Triton, interpreted", out.float().tolist()[:5]),
        )
        assert seen == expected, seen
else:
    print("Triton, compiled for sm_90")
    for name, instruction in (("fp8e4nv", "e4m3x2"), ("fp8e5", "e5m2x2")):
        source = ASTSource(cast, {"x": "*fp32", "out": "*" + name, "N": "constexpr"}, {"N": 64})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        found = set(re.findall(r"cvt\.\S*m\dx2\S*", ptx))
        print(f"  {name:20}", *found)
        assert found == {f"cvt.rn.satfinite.{instruction}.f32"}, found
PY
TRITON_INTERPRET=1 "$python" -W ignore "$dir/case.py"
"$python" "$dir/case.py"
