#!/bin/sh
# SGLang 0.5.23: from what a request is drawn depends on the options of those that decode beside it, and a seed does not help.
# Which way a step is sampled is chosen for the batch, by whether any of it has top_p, top_k or min_p, or is not greedy; and it
# stays chosen after that request has ended, until the batch is empty. The ways are not the same:
# - with --enable-deterministic-inference the noise of a seed is counted by token ids, and by places in the sorted row once one
#   request has a top_p or temperature 0, which is a top_k. The same prompt with the same seed gives other tokens.
# - on a GPU (FlashInfer) top_k and top_p are both read from the model's probabilities, and top_p from what top_k left once one
#   request has a min_p: top_k 2, top_p .5 means two tokens, then one. A request's own min_p, however small, does the same.
# - with top_k 1 and a temperature other than 1, log-probabilities are of the model alone, and of the temperature beside a
#   request that is not greedy.
#
# Run with SGLang's sampler, what it knows of a batch, and its hash in Triton's interpreter (torch 2.13.0, CPU); FlashInfer's
# functions are written as its documentation has them, and the model's logits are a list.
#
# Seen:
#   seed 7, temperature 1         alone: 730 897 0 645 109 211   beside temperature 0: 306 138 228 729 783 612
#   top_k 2, top_p .5, flashinfer alone: a b   beside min_p .01: a   after it has ended: a
#   top_k 2, top_p .5, pytorch    alone: a b   beside min_p .01: a b   after it has ended: a b
#   log-probability, top_k 1, temperature .5   alone: -0.916   beside temperature 1: -0.629

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile triton==3.8.0 numpy==2.3.5 msgspec==0.21.1
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23

cat >"$dir/case.py" <<'PY'
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

site = Path(sys.argv[1])
REAL = {
    "sglang.srt.layers.sampler",
    "sglang.srt.layers.logprob_processor",
    "sglang.srt.sampling.sampling_batch_info",
    "sglang.srt.sampling.sampling_params",
    "sglang.kernels.ops.sampling.murmur_hash",
}


class Stands(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """In place of all other modules of SGLang, which need a server's packages: objects that take any call."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "sglang" or name in REAL:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(site / name.replace(".", "/"))]
        return spec

    def create_module(self, spec):
        return MagicMock(name=spec.name, __spec__=spec, __path__=spec.submodule_search_locations)

    def exec_module(self, module):
        if module.__spec__.name == "sglang.srt.utils.common":
            for name in ("cuda", "hip", "musa", "npu", "xpu", "gfx1250_supported", "pin_memory_available"):
                setattr(module, f"is_{name}", lambda *device: False)
            module.get_bool_env_var = lambda name: False
        if module.__spec__.name == "sglang.srt.managers.schedule_batch":
            module.ScheduleBatch = type("ScheduleBatch", (), {})


sys.meta_path.insert(0, Stands())
import sglang.srt.layers.sampler as sampler  # noqa: E402
from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel  # noqa: E402
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402


def murmur_hash32(seed, positions, columns):
    """As on a GPU."""
    hashed = torch.empty(len(seed), len(columns), dtype=torch.uint32)
    murmur_hash32_kernel[(len(seed), 1)](seed, positions, columns, hashed, len(seed), len(columns), BLOCK_SIZE=1024)
    return hashed


def draw(weights):
    return torch.multinomial(weights, 1).view(-1)


def in_top_k(probs, ks):
    return probs.argsort(-1, descending=True).argsort(-1) < ks.view(-1, 1)


def in_top_p(probs, ps):
    ordered, places = probs.sort(-1, descending=True)
    return torch.zeros_like(probs).bool().scatter(1, places, ordered.cumsum(-1) - ordered < ps.view(-1, 1))


def renormed(probs, kept):
    return probs * kept / (probs * kept).sum(-1, keepdim=True)


def joint(probs, ks, ps, filter_apply_order):
    assert filter_apply_order == "joint"
    return draw(probs * in_top_k(probs, ks) * in_top_p(probs, ps))


sampler.murmur_hash32 = murmur_hash32
sampler.sampler_softmax = lambda logits: logits.softmax(-1)
for switch in (sampler.envs.SGLANG_TRACE_SAMPLER_E2E, sampler.envs.SGLANG_OPT_USE_GUMBEL_SAMPLE):
    switch.get.return_value = False
sampler.top_k_top_p_sampling_from_probs = joint
sampler.top_k_renorm_prob = lambda probs, ks: renormed(probs, in_top_k(probs, ks))
sampler.top_p_renorm_prob = lambda probs, ps: renormed(probs, in_top_p(probs, ps))
sampler.min_p_sampling_from_probs = lambda probs, ps: draw(probs * (probs >= probs.amax(-1, True) * ps.view(-1, 1)))
settings = sampler.get_exec()
settings.deterministic.rl_on_policy_target = None
sampler.is_dp_attention_enabled = lambda: False


def server(backend, deterministic):
    settings.kernel.sampling_backend = backend
    settings.deterministic.enable_deterministic_inference = deterministic
    return sampler.Sampler()


def batch(*requests):
    requests = [
        SimpleNamespace(sampling_params=parameters, custom_logit_processor=None, return_sampling_mask=False)
        for parameters in requests
    ]
    return SamplingBatchInfo.from_schedule_batch(SimpleNamespace(reqs=requests, device="cpu"), 1000)


def first(sample, info, logits, position=0):
    """The token of the first request, and its log-probability."""
    output = SimpleNamespace(next_token_logits=logits.repeat(len(info), 1))
    none = [None] * len(info)
    positions = torch.full((len(info),), position)
    tokens = sample(output, info, True, [0] * len(info), none, positions)
    return int(tokens[0]), float(output.next_token_logprobs[0])


torch.manual_seed(0)
logits = torch.randn(6, 1, 1000)
sample = server("pytorch", True)
seeded = SamplingParams(temperature=1.0, sampling_seed=7)


def drawn(*beside):
    return [first(sample, batch(seeded, *beside), row, position)[0] for position, row in enumerate(logits)]


alone, beside = drawn(), drawn(SamplingParams(temperature=0.0))
told = f"alone: {' '.join(map(str, alone))}   beside temperature 0: {' '.join(map(str, beside))}"
print(f"{'seed 7, temperature 1':29} {told}")
assert alone == drawn(SamplingParams(sampling_seed=8)) != beside == drawn(SamplingParams(top_p=0.9))

logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()


def words(sample, info):
    return " ".join(sorted({"abcd"[first(sample, info, logits)[0]] for _ in range(300)}))


both, small = SamplingParams(top_k=2, top_p=0.5), SamplingParams(min_p=0.01)
for backend, expected in (("flashinfer", ["a b", "a", "a"]), ("pytorch", ["a b"] * 3)):
    sample = server(backend, False)
    info = batch(both, small)
    seen = [words(sample, batch(both)), words(sample, info)]
    info.filter_batch([0], torch.tensor([0]))
    assert len(info) == 1
    seen.append(words(sample, info))
    told = f"alone: {seen[0]}   beside min_p .01: {seen[1]}   after it has ended: {seen[2]}"
    print(f"top_k 2, top_p .5, {backend:10}", told)
    assert seen == expected, seen
with_min_p = batch(SamplingParams(top_k=2, top_p=0.5, min_p=1e-6))
assert words(server("flashinfer", False), with_min_p) == "a"

likeliest = SamplingParams(top_k=1, temperature=0.5)
seen = [round(first(sample, info, logits)[1], 3) for info in (batch(likeliest), batch(likeliest, SamplingParams()))]
print(f"log-probability, top_k 1, temperature .5   alone: {seen[0]}   beside temperature 1: {seen[1]}")
assert seen == [-0.916, -0.629], seen
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
