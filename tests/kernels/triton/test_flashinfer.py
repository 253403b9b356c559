"""FlashInfer's engine lists what our own attend reads, and plans once per step.

FlashInfer is a stand-in that computes in torch and ends at any index that is not the pair's
(tests/support/flashinfer_stand_in.py); with `--device cuda` it is the installed one. Red when: a list has another's token or
misses one, a length differs from what was planned, or the stand-in's parameters are no longer FlashInfer's.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.flashinfer import FlashInferAttend, why_not
from sglang_clusterkv.memory.step import SparseStep
from tests.support import flashinfer_stand_in as stand_in

SCALE = 0.19
SLOTS = 700
PAGE, BUDGET = 16, 64


def test_the_stand_in_has_the_parameters_of_the_installed_flashinfer() -> None:
    assert stand_in.differences() == []


class Step:
    """A step's always-attended and recalled tokens, at random, with poison in all that is not listed."""

    def __init__(self, device: str, heads: int, group: int, channels: int, dtype: torch.dtype, batch: int) -> None:
        generator = torch.Generator().manual_seed(7 * batch + heads)
        self.base_count = torch.randint(1, 40, (batch,), generator=generator)
        self.recalled_count = torch.randint(1, 60, (batch,), generator=generator)
        width = 64
        self.base = torch.zeros(batch, width, dtype=torch.int64)
        self.recalled = torch.zeros(batch, heads, 60, dtype=torch.int64)
        for b in range(batch):
            for h in range(heads):
                # Of the head's own slots no two are one, nor the base's.
                order = 1 + torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(b))
                if h == 0:
                    self.base[b, : self.base_count[b]] = order[: self.base_count[b]]
                first = 100 + 60 * h
                self.recalled[b, h] = order[first : first + 60]
        self.q = torch.randn(batch, heads, group, channels, generator=generator).to(device, dtype)
        self.keys, self.values = (
            torch.randn(SLOTS, heads, channels, generator=generator).to(device, dtype) for _ in range(2)
        )
        self.keys[0], self.values[0] = torch.nan, torch.nan
        self.device, self.heads = device, heads
        lists = {
            name: torch.zeros(batch, 1, dtype=torch.int64) for name in ("pages", "segment_of_page", "segment_begin")
        }
        counts = {"page_count": torch.ones(batch, dtype=torch.int64), "segment_count": torch.ones(batch)}
        on_device = lists | counts | {
            "base_slots": self.base, "base_count": self.base_count, "dense_count": torch.zeros(batch, dtype=torch.int64),
        }  # fmt: skip
        self.step = SparseStep(
            batch=batch,
            recallable_tokens=60,
            lengths=torch.stack([self.base_count, self.recalled_count], 1).numpy(),
            **{name: value.to(device) for name, value in on_device.items()},
        )
        # What the kernel that recalls leaves, with poison behind it.
        recalled = torch.full((batch, heads, BUDGET), 1 << 40)
        recalled[:, :, : self.recalled.shape[2]] = self.recalled
        self.left: Any = SimpleNamespace(
            shape=SimpleNamespace(heads=heads, budget=BUDGET),
            recalled=recalled.to(device),
            recalled_count=self.recalled_count.int().repeat_interleave(heads).view(batch, heads).to(device),
        )

    def prepare(self, engine: FlashInferAttend) -> None:
        engine.prepare(self.step, BUDGET, PAGE)

    def attend(self, engine: FlashInferAttend) -> None:
        engine.attend(self.q, self.keys, self.values, SCALE, self.left)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and natural log-sum-exp in float64."""
        output, lse = self.q.double().cpu(), torch.zeros(self.q.shape[:3], dtype=torch.float64)
        for b in range(self.step.batch):
            for h in range(self.heads):
                chosen = self.recalled[b, h, : self.recalled_count[b]]
                slots = torch.cat([self.base[b, : self.base_count[b]], chosen]).to(self.device)
                logits = SCALE * self.q[b, h].double() @ self.keys[slots, h].double().T
                lse[b, h] = logits.logsumexp(-1)
                output[b, h] = logits.softmax(-1) @ self.values[slots, h].double()
        return output, lse


def engine_of(step: Step) -> FlashInferAttend:
    _, heads, group, channels = step.q.shape
    try:
        return FlashInferAttend(heads, group, channels, step.q.dtype, step.device)
    except Exception as error:
        if step.device == "cpu":
            raise
        pytest.skip(f"FlashInfer has no kernels here: {error}")


@pytest.mark.parametrize(("heads", "group", "channels", "batch"), [(2, 3, 64, 3), (8, 4, 128, 1), (1, 8, 256, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parts_are_those_of_exact_attention(
    heads: int, group: int, channels: int, batch: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        stand_in.install(monkeypatch, heads)
    step = Step(device, heads, group, channels, dtype, batch)
    engine = engine_of(step)
    for _ in range(2):  # the second time into the same memory, with poison in it
        step.prepare(engine)
        engine._any.buffers.indices.fill_(-1)
        step.prepare(engine)
        step.attend(engine)
        output, lse = step.expected()
        got = engine.output[:batch, :, 0].double().cpu()
        torch.testing.assert_close(got, output, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(engine.lse[:batch, :, 0].double().cpu() * math.log(2), lse, atol=2e-3, rtol=2e-3)


def test_one_plan_serves_all_layers_and_a_smaller_step_the_same_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("counts the stand-in's calls")
    stand_in.install(monkeypatch, heads=2)
    large, small = Step(device, 2, 3, 64, torch.bfloat16, 3), Step(device, 2, 3, 64, torch.bfloat16, 2)
    engine = engine_of(large)
    (wrapper,) = stand_in.Wrapper.made
    assert (wrapper.plans, wrapper.runs) == (1, 0)
    large.prepare(engine)
    places = engine.output.data_ptr(), engine.lse.data_ptr()
    for _ in range(4):
        large.attend(engine)
    assert (wrapper.plans, wrapper.runs) == (2, 4)
    small.prepare(engine)
    small.attend(engine)
    assert places == (engine.output.data_ptr(), engine.lse.data_ptr())


@pytest.mark.parametrize("broken", ["a recalled token is not written", "another head", "twice"])
def test_the_stand_in_sees_a_wrong_list(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, heads=2)
    step = Step("cpu", 2, 3, 64, torch.bfloat16, 2)
    engine = engine_of(step)
    step.prepare(engine)
    engine._any.buffers.indices.fill_(-1)
    step.prepare(engine)
    if broken == "a recalled token is not written":
        step.left.recalled_count[1, 1] -= 1
    else:
        # FlashInfer's list ends with it. A slot of half the head's own row is one of the other head.
        step.left.recalled = step.left.recalled.clone()
        last = int(step.recalled_count[1]) - 1
        step.left.recalled[1, 1, last] = step.left.recalled[1, 1, last - 1]
        if broken == "another head":
            monkeypatch.setattr(stand_in.Wrapper, "heads", 3)
    with pytest.raises(AssertionError, match="no row of the pool|another head|listed twice"):
        step.attend(engine)


def test_dense_requests_and_padding_have_lists_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch: a sparse request, a dense one by its pages, and padding, which reads slot 0."""
    if device == "cpu":
        stand_in.install(monkeypatch, heads=2)
    step = Step(device, 2, 3, 64, torch.bfloat16, 3)
    step.keys[0], step.values[0] = 0.0, 1.0
    tokens = 37
    lists = step.step
    pages = torch.zeros(3, 3, dtype=torch.int64, device=device)
    pages[1] = torch.tensor([7, 3, 12])
    count = torch.tensor([1, 0, 0], device=device)
    step.base_count[1], step.base_count[2] = 0, 0
    assert lists.lengths is not None
    lengths = np.array([lists.lengths[0], [tokens, 0], [0, 0]])
    step.step = lists._replace(
        pages=pages, page_count=count, dense_count=torch.tensor([0, tokens, 0], device=device), lengths=lengths,
        base_count=step.base_count.to(device),
    )  # fmt: skip
    engine = engine_of(step)
    step.prepare(engine)
    step.attend(engine)
    slots = (pages[1].unsqueeze(1) * PAGE + torch.arange(PAGE, device=device)).flatten()[:tokens]
    for h in range(2):
        logits = SCALE * step.q[1, h].double() @ step.keys[slots, h].double().T
        expected = logits.softmax(-1) @ step.values[slots, h].double()
        torch.testing.assert_close(engine.output[1, h, 0].double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(engine.output[0, :, 0].double().cpu(), step.expected()[0][0], atol=2e-2, rtol=2e-2)
    assert (engine.output[2] == 1).all()


DEFAULT = ClusterKVConfig()


@pytest.mark.parametrize(
    ("config", "channels", "dtype", "slots", "why"),
    [
        (DEFAULT, 128, torch.bfloat16, 1 << 20, None),
        (DEFAULT, 64, torch.float16, 1 << 20, None),
        (DEFAULT, 128, torch.float32, 1 << 20, "no kernels for a KV cache in float32"),
        (DEFAULT, 128, torch.float8_e4m3fn, 1 << 20, "queries and a KV cache of one type"),
        (DEFAULT, 96, torch.bfloat16, 1 << 20, "heads of 64, 128, 256 channels, not of 96"),
        (DEFAULT, 128, torch.bfloat16, 1 << 28, "268,435,456 slots of 8 kv heads"),
        (ClusterKVConfig(trace=True), 128, torch.bfloat16, 1 << 20, "traces"),
        (ClusterKVConfig(host_ratio=2), 128, torch.bfloat16, 1 << 20, "host_ratio is above 1"),
    ],
)
def test_what_flashinfer_cannot_serve_is_said(
    config: ClusterKVConfig, channels: int, dtype: torch.dtype, slots: int, why: str | None
) -> None:
    found = why_not(config, 8, channels, dtype, slots)
    assert found == why if why is None else why in (found or "")
