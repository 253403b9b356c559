"""What `check` says of a GPU, with the machine's facts replaced by those of one.

Red when: a backend or an engine that runs there is said not to, or the other way round, or a probe that fails ends the command.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.runtime_context import override_platform

from sglang_clusterkv.serving import gpu_facts
from tests.support import flashinfer_stand_in as stand_in

H200 = {"is_sm100": False, "device_capability": (9, 0), "has_flashinfer": True}
B200 = {"is_sm100": True, "device_capability": (10, 0), "has_flashinfer": False}


def on(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """A machine with this GPU."""
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=143_771_500_000
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_gpu_with_everything_is_told_with_what_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA H200", (9, 0))
    monkeypatch.setattr(gpu_facts, "_no_kernels", lambda: None)
    stand_in.install(monkeypatch, heads=8)
    with override_platform(**H200):
        facts = gpu_facts.report()
    assert facts["device"] == {
        "name": "NVIDIA H200", "capability": "9.0", "sms": 132, "gigabytes": 144, "not_served": None
    }  # fmt: skip
    assert [name for name, why in facts["prefill"].items() if why is None] == ["fa3", "flashinfer", "triton"]
    assert facts["attend"] == {"triton": None, "flashinfer": None}
    text = "\n".join(gpu_facts.lines(facts))
    assert (
        "NVIDIA H200, compute capability 9.0, 132 SMs, 144 GB" in text and "fa3 runs; trtllm_mha needs a GPU of" in text
    )


def test_what_does_not_run_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA B200", (10, 0))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with override_platform(**B200):
        facts = gpu_facts.report()
    assert [name for name, why in facts["prefill"].items() if why is None] == ["trtllm_mha", "triton"]
    assert facts["attend"] == {"triton": None, "flashinfer": "FlashInfer is not installed"}


def test_kernels_need_a_compiler_unless_they_came_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    env: Any = SimpleNamespace(FLASHINFER_AOT_DIR=tmp_path)
    monkeypatch.setitem(sys.modules, "flashinfer.jit", SimpleNamespace(env=env))
    monkeypatch.setattr(gpu_facts, "_compiler", lambda: False)
    assert "there is no nvcc" in (gpu_facts._no_kernels() or "")
    compiled = tmp_path / "batch_prefill_x" / "batch_prefill_x.so"
    compiled.parent.mkdir()
    compiled.touch()
    assert gpu_facts._no_kernels() is None
    compiled.unlink()
    monkeypatch.setattr(gpu_facts, "_compiler", lambda: True)
    assert gpu_facts._no_kernels() is None


def test_a_probe_that_fails_is_a_line_and_an_old_gpu_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "Tesla T4", (7, 5))

    def fails() -> dict[str, str | None]:
        raise RuntimeError("no driver")

    monkeypatch.setattr(gpu_facts, "_prefill", fails)
    monkeypatch.setattr(gpu_facts, "_attend", fails)
    lines = gpu_facts.lines(gpu_facts.report())
    assert "the kernels need 8.0 or newer" in lines[0]
    assert lines[1:3] == [f"{name}: not known (RuntimeError: no driver)" for name in ("prefill", "attend_engine")]


def test_amd_is_said_not_to_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_facts.lines(gpu_facts.report()) == ["GPU: none (AMD GPUs are not served); servers run on the CPU"]
