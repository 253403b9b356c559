#!/bin/sh
# SGLang 0.5.23: presence, frequency and repetition penalties know an answer a token late, and count the prompt's last token as if
# it had been written. With the overlap schedule, which is on unless --disable-overlap-schedule is given, a step is prepared before
# the host has the last step's token; the penalizers are fed the newest one that the host knows. So a token that was just written is
# not penalized in the next step, where it matters most, and the first decode step counts the prompt's end. At temperature 0 the two
# schedules give other answers. A server on a CPU (torch_native, a model of random weights) wrote what stands here.
#
# Run with both event loops, the penalizers and what feeds them, of SGLang (torch 2.13.0, CPU); the model's logits are a list.
#
# Seen, logits a 6.0, b 5.5, c 5.0, d 4.5, e 4.0, presence_penalty 2.0:
#   prompt "... e"   without overlap: a b c d a a   with it: a a b b c c
#   prompt "... b"   without overlap: a b c d a a   with it: a a c c d d

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
from collections import deque
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
Presence = importlib.import_module(f"{penaltylib}.presence_penalty").BatchedPresencePenalizer


class Off:
    """All switches of the environment are off."""

    def __getattr__(self, name):
        return SimpleNamespace(get=lambda: False)


def method(file, name, **names):
    """A method out of a module that needs a server's packages."""
    (node,) = [
        node
        for node in ast.walk(ast.parse((site / "sglang/srt/managers" / file).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    node.decorator_list = []
    exec(compile(ast.Module([node], []), file, "exec", __future__.annotations.compiler_flag), names)
    return names[name]


WORDS, LOGITS, STEPS = "abcde", torch.tensor([[6.0, 5.5, 5.0, 4.5, 4.0]]), 6


class Batch:
    """One request, in as much of a ScheduleBatch as is needed."""

    device, spec_algorithm = "cpu", SimpleNamespace(is_none=lambda: True)
    feed = method(
        "schedule_batch.py", "cumulate_penalty_output_tokens", torch=torch, is_pin_memory_available=lambda device: False
    )

    def __init__(self, request, forward, penalizers=None):
        self.reqs = [request]
        self.forward_mode = SimpleNamespace(is_extend=lambda: forward == "extend", is_decode=lambda: forward == "decode")
        penalizers = penalizers or Orchestrator(len(WORDS), self, {Presence})
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=penalizers)

    def copy(self):
        return self


class Scheduler:
    """A result is a token, which the host has once it is processed."""

    gracefully_exit = _engine_paused = enable_unified_memory = require_mlp_sync = False
    is_generation, running_batch, last_batch, batch = True, None, None, None
    event_loop_normal = method("scheduler.py", "event_loop_normal", envs=Off())
    event_loop_overlap = method("scheduler.py", "event_loop_overlap", envs=Off(), deque=deque)
    is_disable_overlap_for_batch = method("scheduler.py", "is_disable_overlap_for_batch", envs=Off())

    def __init__(self, last):
        parameters = SimpleNamespace(presence_penalty=2.0)
        self.request = SimpleNamespace(origin_input_ids=[WORDS.index(last)], output_ids=[], sampling_params=parameters)

    def ingest_requests(self):
        self.gracefully_exit = len(self.request.output_ids) >= STEPS

    def get_next_batch_to_run(self, running_batch, last_batch):
        if last_batch is None:
            self.batch = Batch(self.request, "extend")
        else:  # what ScheduleBatch.prepare_for_decode does
            self.batch = Batch(self.request, "decode", last_batch.sampling_info.penalizer_orchestrator)
            if self.batch.sampling_info.penalizer_orchestrator.is_required:
                self.batch.feed()
        return SimpleNamespace(running_batch=self.batch, batch_to_run=self.batch)

    def run_batch(self, batch):
        penalties = torch.zeros_like(LOGITS)
        batch.sampling_info.penalizer_orchestrator.accumulate_additive_penalties(penalties)
        return int((LOGITS + penalties).argmax())

    def process_batch_result(self, batch, result):
        self.request.output_ids.append(result)

    def _apply_war_barrier(self):
        """There is no device to wait for."""

    def launch_batch_sample_if_needed(self, result, batch):
        """Sampling waits for a grammar; there is none."""


def answer(loop, last):
    scheduler = Scheduler(last)
    getattr(scheduler, loop)()
    return " ".join(WORDS[token] for token in scheduler.request.output_ids[:STEPS])


for last, expected in (("e", ("a b c d a a", "a a b b c c")), ("b", ("a b c d a a", "a a c c d d"))):
    seen = answer("event_loop_normal", last), answer("event_loop_overlap", last)
    print(f'prompt "... {last}"   without overlap: {seen[0]}   with it: {seen[1]}')
    assert seen == expected, seen
# That a decode step is fed as here.
source = (site / "sglang/srt/managers/schedule_batch.py").read_text()
(prepare,) = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == "prepare_for_decode"]
assert "cumulate_penalty_output_tokens" in ast.dump(prepare)
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
