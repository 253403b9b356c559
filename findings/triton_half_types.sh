#!/bin/sh
# Triton 3.8.0: which type a reduction or a sum of 16-bit floats has follows no one rule. tl.max goes to fp32 for both, tl.sum
# adds in the type itself, so that a sum of bf16 is added in bf16, and tl.cumsum goes to fp32 for bf16 alone. An fp16 beside
# a bf16 makes fp16, where 1e5 is infinity (torch makes fp32 of the two). An int8 beside a bf16 makes fp32, beside an fp16 it
# makes fp16.
#
# Seen:
#   of     bf16 fp16
#   sum    bf16 fp16
#   max    fp32 fp32
#   cumsum fp32 fp16
#   + int8 fp32 fp16
#   fp16 + bf16 fp16
#   the sum of bf16 is added in bf16

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" TRITON_CACHE_DIR="$dir/triton"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile triton==3.8.0

cat >"$dir/case.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def types(b, h, c, out):
    where = tl.arange(0, 64)
    bf16, fp16, int8 = tl.load(b + where), tl.load(h + where), tl.load(c + where)
    tl.static_print("sum   ", tl.sum(bf16, 0).dtype, tl.sum(fp16, 0).dtype)
    tl.static_print("max   ", tl.max(bf16, 0).dtype, tl.max(fp16, 0).dtype)
    tl.static_print("cumsum", tl.cumsum(bf16, 0).dtype, tl.cumsum(fp16, 0).dtype)
    tl.static_print("+ int8", (bf16 + int8).dtype, (fp16 + int8).dtype)
    tl.static_print("fp16 + bf16", (fp16 + bf16).dtype)
    tl.static_assert(tl.sum(bf16, 0).dtype == tl.bfloat16 and tl.sum(fp16, 0).dtype == tl.float16)
    tl.static_assert(tl.max(bf16, 0).dtype == tl.float32 and tl.max(fp16, 0).dtype == tl.float32)
    tl.static_assert(tl.cumsum(bf16, 0).dtype == tl.float32 and tl.cumsum(fp16, 0).dtype == tl.float16)
    tl.static_assert((bf16 + int8).dtype == tl.float32 and (fp16 + int8).dtype == tl.float16)
    tl.static_assert((fp16 + bf16).dtype == tl.float16)
    tl.store(out, tl.sum(bf16, 0))


print("of     bf16 fp16")
source = ASTSource(types, {"b": "*bf16", "h": "*fp16", "c": "*i8", "out": "*fp32"})
ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
added_in = set(re.findall(r"arith\.addf .* : (\w+)", ttir))
print("the sum of bf16 is added in", *added_in)
assert added_in == {"bf16"}
PY
"$python" "$dir/case.py"
