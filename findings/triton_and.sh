#!/bin/sh
# Triton 3.8.0: `and` between two scalars of a kernel does not stop at a false left side. Compiled, both sides are evaluated
# before the branch, with what they load or change, so `if n > 0 and tl.atomic_add(...)` adds for every n, and a bound on the
# left does not guard a load on the right. In the interpreter `and` is Python's, so no test there can show it.
#
# Seen:
#   interpreted with n = 0, additions: 0
#   compiled: the addition stands before the branch on n

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
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def count(counter, n):
    if n > 0 and tl.atomic_add(counter, 1) >= 0:
        tl.store(counter + 1, 1)


if triton.knobs.runtime.interpret:
    counter = torch.zeros(2, dtype=torch.int32)
    count[(1,)](counter, 0)
    print("interpreted with n = 0, additions:", counter[0].item())
    assert counter[0] == 0
else:
    source = ASTSource(count, {"counter": "*i32", "n": "i32"})
    lines = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"].splitlines()
    add, branch = (next(i for i, line in enumerate(lines) if word in line) for word in ("tt.atomic_rmw", "scf.if"))
    print("compiled:", "the addition stands", "before" if add < branch else "inside", "the branch on n")
    assert add < branch
PY
TRITON_INTERPRET=1 "$python" "$dir/case.py"
"$python" "$dir/case.py"
