#!/bin/sh
# SGLang 0.5.23: a request that is retracted because the KV cache is full keeps its tokens and loses what was counted of them. Penalties
# and min_new_tokens live with the batch; when the request is prefilled again it gets new counts, of nothing. So words that were
# penalized come again as if they had never been written, and an answer of which 9 of 12 tokens at least were there must have
# 12 more before it may end. Nothing tells the client, and at temperature 0 the answer hangs on how full the server was. A server on a
# CPU (SGLANG_TEST_RETRACT, a model of random weights) did the same: min_new_tokens 40, retracted at 24, ended after 64.
#
# Run with SGLang's penalizers, what feeds them, and what a retraction resets (torch 2.13.0, CPU); the model's logits are a list, with
# the end as the likeliest token.
#
# Seen, frequency_penalty 1.0, min_new_tokens 12:
#   undisturbed          12 tokens: a b a c b d a c b d a c
#   retracted after 9    21 tokens: a b a c b d a c b a b a c b d a c b d a c

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile numpy==2.3.5
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23

cat >"$dir/case.py" <<'PY'
import __future__

import ast
import importlib
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch

site = Path(sys.argv[1])
# The packages without what they import for servers.
for name in ("sglang", "sglang.srt", "sglang.srt.sampling", "sglang.srt.sampling.penaltylib"):
    package = types.ModuleType(name)
    package.__path__ = [str(site / name.replace(".", "/"))]
    sys.modules[name] = package
for name in ("sglang.srt.utils", "sglang.srt.utils.common"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].is_pin_memory_available = lambda device: False
penaltylib = "sglang.srt.sampling.penaltylib"
Orchestrator = importlib.import_module(f"{penaltylib}.orchestrator").BatchedPenalizerOrchestrator
Frequency = importlib.import_module(f"{penaltylib}.frequency_penalty").BatchedFrequencyPenalizer
Least = importlib.import_module(f"{penaltylib}.min_new_tokens").BatchedMinNewTokensPenalizer


def method(name, **names):
    """A method of schedule_batch.py, which needs a server's packages."""
    source = (site / "sglang/srt/managers/schedule_batch.py").read_text()
    (node,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == name]
    exec(compile(ast.Module([node], []), "schedule_batch.py", "exec", __future__.annotations.compiler_flag), names)
    return names[name]


END, WORDS, LOGITS = 0, " abcd", torch.tensor([[9.0, 4.0, 3.5, 3.0, 2.5]])


class Request(SimpleNamespace):
    reset_for_retract = method("reset_for_retract")


class Batch:
    """A batch that was made for a prefill of one request."""

    device = "cpu"
    feed = method("cumulate_penalty_output_tokens", torch=torch, is_pin_memory_available=lambda device: False)

    def __init__(self, request):
        self.reqs = [request]
        # As SamplingBatchInfo.from_schedule_batch does.
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=Orchestrator(len(WORDS), self, {Frequency, Least}))


def answer(retracted_after=None):
    request = Request(
        origin_input_ids=[1],
        output_ids=[],
        sampling_params=SimpleNamespace(frequency_penalty=1.0, min_new_tokens=12, stop_token_ids=None),
        tokenizer=SimpleNamespace(eos_token_id=END, additional_stop_token_ids=None),
        eos_token_ids={END},
        kv=SimpleNamespace(holds_kv=False),
        retraction_count=0,
        input_embeds=None,
    )
    batch = Batch(request)
    while True:
        logits = LOGITS.clone()
        batch.sampling_info.penalizer_orchestrator.apply(logits)
        token = int(logits.argmax())
        if token == END:
            return request.output_ids
        request.output_ids.append(token)
        if len(request.output_ids) == retracted_after:
            request.reset_for_retract()
            batch = Batch(request)  # prefills the prompt and what was written
        else:
            batch.feed()


for name, after, expected in (("undisturbed", None, "abacbdacbdac"), ("retracted after 9", 9, "abacbdacb" + "abacbdacbdac")):
    words = [WORDS[token] for token in answer(after)]
    print(f"{name:20} {len(words)} tokens: {' '.join(words)}")
    assert "".join(words) == expected
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
