#!/bin/sh
# Triton 3.8.0 with TRITON_INTERPRET=1 (torch 2.13.0 for the tensors): bf16 is kept as 16-bit integers, and arithmetic is
# done on those integers without a word. tl.dot of ones over 16 channels gives 4.2e9, not 16; a sum of 64 ones is not 64.
# fp16 and fp32 are right. A store of fp32 to bf16 cuts the low bits off, where a GPU (cvt.rn.bf16.f32) and torch round.
#
# Seen:
#   torch.float32: dot of 16 ones 16, sum of 64 ones 64
#   torch.float16: dot of 16 ones 16, sum of 64 ones 64
#   torch.bfloat16: dot of 16 ones 4.228e+09, sum of 64 ones -3.689e+19
#   stored as bf16: [1.0, 1.9921875, 3.140625, 100.0]
#   torch's cast:   [1.0078125, 2.0, 3.140625, 100.5]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" TRITON_INTERPRET=1
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile triton==3.8.0 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def dot(a, out):
    row = tl.arange(0, 16)
    where = row[:, None] * 16 + row[None, :]
    tile = tl.load(a + where)
    tl.store(out + where, tl.dot(tile, tile))


@triton.jit
def total(a, out):
    tl.store(out, tl.sum(tl.load(a + tl.arange(0, 64)), 0))


@triton.jit
def copy(a, out):
    where = tl.arange(0, 4)
    tl.store(out + where, tl.load(a + where))


products, sums = {}, {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    out = torch.empty(16, 16)
    dot[(1,)](torch.ones(16, 16, dtype=dtype), out)
    products[dtype] = out[0, 0].item()
    total[(1,)](torch.ones(64, dtype=dtype), out)
    sums[dtype] = out[0, 0].item()
    print(f"{dtype}: dot of 16 ones {products[dtype]:.4g}, sum of 64 ones {sums[dtype]:.4g}")
values = torch.tensor([1.0078, 1.9999, 3.1415927, 100.4])
cut = torch.empty(4, dtype=torch.bfloat16)
copy[(1,)](values, cut)
rounded = values.bfloat16()
print("stored as bf16:", cut.tolist())
print("torch's cast:  ", rounded.tolist())
assert products[torch.float32] == products[torch.float16] == 16
assert sums[torch.float32] == sums[torch.float16] == 64
assert products[torch.bfloat16] > 1e9 and sums[torch.bfloat16] != 64
assert (cut <= rounded).all() and (cut < rounded).any()
PY
"$python" "$dir/case.py"
