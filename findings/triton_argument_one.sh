#!/bin/sh
# Triton 3.8.0: a kernel counts otherwise where an integer argument is 1. Such an argument is compiled in as a constant, which is
# known; but a constant has no type of its own, where any other value is an int32. So `codes - zero` of uint8 codes is int32 for
# zero 0 or 2 and uint8 for zero 1, where 0 - 1 is 255: a kernel that takes 4- or 8-bit weights apart is right for each zero
# point but this one. What is made of such arguments alone is Python's: (n - 8) // 3 is -3 for n = 1, rounded down, where the
# others' quotients are rounded to zero. The interpreter takes 1 as any other number. `do_not_specialize`, or codes.to(tl.int32),
# is a way out.
#
# Compiled for sm_90, with the types that a launch with these values would have; then run in the interpreter (torch 2.13.0).
#
# Seen:
#   zero 0: a launch has i32, codes - zero is int32
#   zero 1: a launch has constexpr, codes - zero is uint8
#   zero 2: a launch has i32, codes - zero is int32
#   n 0: (n - 8) // 3 is compiled as sdiv
#   n 1: (n - 8) // 3 is compiled as -3
#   interpreter, codes 0 and 7: zero 0 -> [0, 7], zero 1 -> [-1, 6], zero 2 -> [-2, 5]; n 0 -> -2, n 1 -> -2

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
from triton.runtime.jit import mangle_type


@triton.jit
def take_apart(codes, zero, out):
    where = tl.arange(0, 2)
    tl.store(out + where, (tl.load(codes + where) - zero).to(tl.float32))


@triton.jit
def divide(n, out):
    tl.store(out, (n - 8) // 3)


def compiled(kernel, value, **pointers):
    """As a launch of the kernel with this value would compile it."""
    (name,) = [name for name in kernel.arg_names if name not in pointers]
    kind = mangle_type(value, specialize=True)
    known = {name: value} if kind == "constexpr" else {}
    source = ASTSource(kernel, {name: kind, **pointers}, known)
    return kind, triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]


if triton.knobs.runtime.interpret:
    told = []
    for zero in (0, 1, 2):
        out = torch.empty(2)
        take_apart[(1,)](torch.tensor([0, 7], dtype=torch.uint8), zero, out)
        assert out.tolist() == [-zero, 7 - zero]
        told.append(f"zero {zero} -> {out.int().tolist()}")
    rounded = []
    for n in (0, 1):
        out = torch.empty(1, dtype=torch.int32)
        divide[(1,)](n, out)
        rounded.append(f"n {n} -> {out.item()}")
        assert out.item() == -2
    print(f"interpreter, codes 0 and 7: {', '.join(told)}; {', '.join(rounded)}")
else:
    for zero, kind, expected in ((0, "i32", "int32"), (1, "constexpr", "uint8"), (2, "i32", "int32")):
        launched, ttir = compiled(take_apart, zero, codes="*u8", out="*fp32")
        (bits,) = re.findall(r"arith\.subi .*tensor<2xi(\d+)>", ttir)
        (to_float,) = re.findall(r"arith\.([su])itofp", ttir)
        seen = ("u" if to_float == "u" else "") + f"int{bits}"
        print(f"zero {zero}: a launch has {launched}, codes - zero is {seen}")
        assert (launched, seen) == (kind, expected)
    for n, expected in ((0, "sdiv"), (1, "-3")):
        ttir = compiled(divide, n, out="*i32")[1]
        seen = "sdiv" if "arith.divsi" in ttir else re.search(r"arith\.constant (-?\d+) : i32", ttir)[1]
        print(f"n {n}: (n - 8) // 3 is compiled as {seen}")
        assert seen == expected
PY
"$python" "$dir/case.py"
TRITON_INTERPRET=1 "$python" "$dir/case.py"
