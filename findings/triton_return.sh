#!/bin/sh
# Triton 3.8.0: a `return` under a condition that is known when a kernel is compiled does not end the compilation of that
# variant. What follows it is compiled too, with constants for which it was never meant: a division of constants by the zero
# that the branch was there for is an error of the compiler, though no program could reach it. The same code in an `else`
# compiles, as the branch that is not taken is left out.
#
# Seen:
#   after_return, PARTS = 4: compiled
#   after_return, PARTS = 0: integer division or modulo by zero
#   in_else, PARTS = 4: compiled
#   in_else, PARTS = 0: compiled

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" TRITON_CACHE_DIR="$dir/triton"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile triton==3.8.0

cat >"$dir/case.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError


@triton.jit
def after_return(out, PARTS: tl.constexpr):
    if PARTS == 0:
        tl.store(out, 0)
        return
    tl.store(out, 64 // PARTS)


@triton.jit
def in_else(out, PARTS: tl.constexpr):
    if PARTS == 0:
        tl.store(out, 0)
    else:
        tl.store(out, 64 // PARTS)


seen = {}
for kernel in (after_return, in_else):
    for parts in (4, 0):
        source = ASTSource(kernel, {"out": "*i32", "PARTS": "constexpr"}, {"PARTS": parts})
        try:
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
            seen[kernel.__name__, parts] = "compiled"
        except CompilationError as error:
            seen[kernel.__name__, parts] = str(error).splitlines()[-1]
        print(f"{kernel.__name__}, PARTS = {parts}: {seen[kernel.__name__, parts]}")
assert seen.pop(("after_return", 0)).endswith("by zero")
assert set(seen.values()) == {"compiled"}
PY
"$python" "$dir/case.py"
