#!/bin/sh
# Triton 3.8.0: how many places of a mask are true is a number without a sign. A comparison is of type int1, which Triton counts
# among the unsigned types, and tl.sum and tl.cumsum of it are uint32, where those of int8 or int16 are int32. What is made of
# the count is uint32 too, beside an int32 as well. So tl.maximum(count - 8, 0) of a count of 3 is not 0 but 4294967291 (-5 in an
# int32), `count - 8 > 0` is true, `n - count < 0` never, (count - 8) // 2 is 2147483645 and `count > -1` is false. torch, numpy
# and numba count in signed integers. The interpreter and the compiler agree, so no test of one against the other shows it;
# mask.to(tl.int32) does away with it.
#
# Run in the interpreter (torch 2.13.0), and compiled for sm_90.
#
# Seen, for a mask of which three places of eight are true:
#   tl.maximum(count - 8, 0) -5, count - 8 > 0 True, 2 - count < 0 False, (count - 8) // 2 2147483645, count > -1 False
#   with .to(tl.int32): 0 False True -2 True
#   compiled: int1 -> uint32, int8 -> int32, int16 -> int32; comparisons of the count: ugt ult, not sgt slt

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
def beyond(x, n, out, SIGNED: tl.constexpr):
    mask = tl.load(x + tl.arange(0, 8)) > 0
    count = tl.sum(mask.to(tl.int32) if SIGNED else mask, 0)
    tl.store(out, tl.maximum(count - 8, 0))
    tl.store(out + 1, count - 8 > 0)
    tl.store(out + 2, n - count < 0)
    tl.store(out + 3, (count - 8) // 2)
    tl.store(out + 4, count > -1)


@triton.jit
def types(x, bytes_, halves):
    mask = tl.load(x + tl.arange(0, 8)) > 0
    tl.static_assert(mask.dtype == tl.int1 and tl.cumsum(mask, 0).dtype == tl.uint32)
    tl.static_assert(tl.sum(tl.load(bytes_ + tl.arange(0, 8)), 0).dtype == tl.int32)
    tl.static_assert(tl.sum(tl.load(halves + tl.arange(0, 8)), 0).dtype == tl.int32)


if triton.knobs.runtime.interpret:
    x = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    told = "tl.maximum(count - 8, 0) {}, count - 8 > 0 {}, 2 - count < 0 {}, (count - 8) // 2 {}, count > -1 {}"
    for signed, line, expected in (
        (0, told, [-5, 1, 0, 2147483645, 0]),
        (1, "with .to(tl.int32): {} {} {} {} {}", [0, 0, 1, -2, 1]),
    ):
        out = torch.empty(5, dtype=torch.int32)
        beyond[(1,)](x, 2, out, signed)
        seen = out.tolist()
        print(line.format(seen[0], bool(seen[1]), bool(seen[2]), seen[3], bool(seen[4])))
        assert seen == expected, seen
else:

    def compiled(kernel, signature, **known):
        return triton.compile(ASTSource(kernel, signature, known), target=GPUTarget("cuda", 90, 32)).asm["ttir"]

    kinds = {}
    for signed in (0, 1):
        ttir = compiled(beyond, {"x": "*fp32", "n": "i32", "out": "*i32", "SIGNED": "constexpr"}, SIGNED=signed)
        kinds[signed] = sorted(set(re.findall(r"arith\.cmpi ([us].t)", ttir)))
    compiled(types, {"x": "*fp32", "bytes_": "*i8", "halves": "*i16"})
    print("compiled: int1 -> uint32, int8 -> int32, int16 -> int32;", end=" ")
    print(f"comparisons of the count: {' '.join(kinds[0])}, not {' '.join(kinds[1])}")
    assert kinds == {0: ["ugt", "ult"], 1: ["sgt", "slt"]}, kinds
PY
TRITON_INTERPRET=1 "$python" "$dir/case.py"
"$python" "$dir/case.py"
