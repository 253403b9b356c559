#!/bin/sh
# Triton 3.8.0: tl.dot no longer wants 16 rows and 16 columns. For NVIDIA GPUs from sm_80 on, one row or one column compiles
# to the tensor cores' m16n8k16, filled up by the compiler, so there is no need to pad a query's tile by hand. Only the inner
# dimension must still be 16 or more (bf16). The interpreter multiplies any shape, so a test there does not notice a K of 8.
#
# Seen:
#   interpreted 1 x 64 x 64: right
#   interpreted 64 x 1 x 64: right
#   interpreted 1 x 1 x 16: right
#   interpreted 16 x 16 x 8: right
#   sm_80 1 x 64 x 64: m16n8k16
#   sm_90 1 x 64 x 64: m16n8k16
#   sm_100 1 x 64 x 64: m16n8k16
#   sm_80 64 x 1 x 64: m16n8k16
#   sm_90 64 x 1 x 64: m16n8k16
#   sm_100 64 x 1 x 64: m16n8k16
#   sm_80 1 x 1 x 16: m16n8k16
#   sm_90 1 x 1 x 16: m16n8k16
#   sm_100 1 x 1 x 16: m16n8k16
#   sm_80 16 x 16 x 8: Input shapes should have M >= 1, N >= 1 and K >= 16
#   sm_90 16 x 16 x 8: Input shapes should have M >= 1, N >= 1 and K >= 16
#   sm_100 16 x 16 x 8: Input shapes should have M >= 1, N >= 1 and K >= 16

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
from triton.compiler import ASTSource, CompilationError


@triton.jit
def dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y))


SHAPES = [(1, 64, 64), (64, 1, 64), (1, 1, 16), (16, 16, 8)]
TYPES = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "M": "constexpr", "N": "constexpr", "K": "constexpr"}
if triton.knobs.runtime.interpret:
    for m, n, k in SHAPES:
        out = torch.empty(m, n)
        dot[(1,)](torch.ones(m, k), torch.ones(k, n), out, m, n, k)
        print(f"interpreted {m} x {n} x {k}:", "right" if (out == k).all() else "wrong")
        assert (out == k).all()
else:
    for m, n, k in SHAPES:
        for capability in (80, 90, 100):
            source = ASTSource(dot, TYPES, {"M": m, "N": n, "K": k})
            try:
                ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
                (seen,) = set(re.findall(r"mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
            except CompilationError as error:
                seen = str(error).splitlines()[-1]
            print(f"sm_{capability} {m} x {n} x {k}: {seen}")
            assert seen.endswith("K >= 16") if k == 8 else seen == "m16n8k16"
PY
TRITON_INTERPRET=1 "$python" "$dir/case.py"
"$python" "$dir/case.py"
