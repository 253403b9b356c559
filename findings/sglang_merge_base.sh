#!/bin/sh
# SGLang 0.5.23 with FlashInfer 0.7.2 (torch 2.13.0, Triton 3.8.0): a prefill behind a cached prefix by `--attention-backend flashinfer`
# is right up to 64 query heads of 128 channels on a GPU, and wrong beyond. It merges attention to the prefix and to the new
# tokens by their log-sum-exps, which FlashInfer gives in base 2. Up to 64 heads FlashInfer's own `merge_state` does it; with more,
# whose launch would not fit a block, SGLang calls a Triton kernel of its own, which takes them to be natural. The part that
# has more of the softmax gets too much of it: mostly the prefix, and new tokens too little.
#
# Run with SGLang's function and kernel, in Triton's interpreter; FlashInfer's merge and base are read in its sources. 3,072 tokens of
# a prefix, 64 new ones.
#
# Seen:
#   FlashInfer's log-sum-exp: m + math::ptx_log2(d)
#   64 heads: merged by FlashInfer, largest error 0.000, new tokens get 2.0% of the mass, of 2.0%
#   96 heads: merged by merge_state_triton, largest error 0.084, new tokens get 0.4% of the mass, of 2.0%

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" TRITON_INTERPRET=1
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile triton==3.8.0 numpy==2.3.5
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23 flashinfer-python==0.7.2

cat >"$dir/case.py" <<'PY'
import ast
import importlib.util
import sys
from pathlib import Path

import torch

site = Path(sys.argv[1])
sources = site / "sglang/srt/layers/attention/flashinfer_backend.py", site / "sglang/kernels/ops/attention/merge_state.py"
state = (site / "flashinfer/data/include/flashinfer/attention/state.cuh").read_text()
(base,) = [line for line in state.splitlines() if "get_lse()" in line]
print("FlashInfer's log-sum-exp:", base[base.index("return") + 7 : base.index(";")])
assert "log2" in base

spec = importlib.util.spec_from_file_location("merge_state", sources[1])
kernels = importlib.util.module_from_spec(spec)
sys.modules["merge_state"] = kernels
spec.loader.exec_module(kernels)
used = []


def merge_state(v_a, s_a, v_b, s_b):
    """FlashInfer's: shares are powers of two."""
    used.append("FlashInfer")
    shares = torch.stack([s_a, s_b]).mul(0.6931471805599453).softmax(0).unsqueeze(-1)
    return (shares * torch.stack([v_a, v_b])).sum(0), None


def merge_state_triton(*of):
    used.append("merge_state_triton")
    return kernels.merge_state_triton(*of)


# What the backend merges with: it lies in a module that needs a GPU.
names = {"torch": torch, "merge_state": merge_state, "merge_state_triton": merge_state_triton}
for node in ast.walk(ast.parse(sources[0].read_text())):
    named = getattr(node, "name", None) or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None))
    if named in ("_MERGE_STATE_CUDA_MAX_THREADS_PER_BLOCK", "_merge_state_max_safe_num_heads", "_safe_merge_state"):
        exec(compile(ast.Module([node], []), "backend", "exec"), names)

errors = []
for heads in (64, 96):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, 128, generator=generator) for n in (1, 3072 + 64, 3072 + 64))
    v[3072:] += 2.0  # new tokens tell something else than the prefix
    logits = torch.einsum("qhd,khd->qhk", q, k) / 128**0.5
    parts = []
    for part in (slice(0, 3072), slice(3072, None)):
        weights = logits[..., part].softmax(-1)
        output = torch.einsum("qhk,khd->qhd", weights, v[part]).half()
        parts += [output, logits[..., part].logsumexp(-1) / 0.6931471805599453]
    whole = torch.einsum("qhk,khd->qhd", logits.softmax(-1), v)
    merged = names["_safe_merge_state"](*parts)[0].float()
    error = float((merged - whole).abs().max())
    right = float(logits.softmax(-1)[..., 3072:].sum(-1).mean())
    # The share that merging gave to the second part, from both outputs and what became of them.
    apart = parts[2].float() - parts[0].float()
    share = float((((merged - parts[0].float()) * apart).sum(-1) / (apart**2).sum(-1)).mean())
    print(f"{heads} heads: merged by {used[-1]}, largest error {error:.3f}, new tokens get {share:.1%} of the mass, of {right:.1%}")
    errors.append(error)
assert used == ["FlashInfer", "merge_state_triton"] and errors[0] < 0.01 < errors[1]
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
