"""Recalled extends through the backend, as SGLang calls it: who recalls, who attends to everything, and what a fault costs.

Red when: a request of a batch gets another one's lines; new tokens attend before all of them are in the pool; a layer that
never recalls does so in a prefill; a layer's fault reaches SGLang, or what comes after it does not attend to everything.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode.cpu import CpuDecoder
from sglang_clusterkv.kernels.extend.cpu import extend
from sglang_clusterkv.serving import runtime
from tests.clusters.test_extending import found
from tests.clusters.test_faults import Nth
from tests.serving.test_layer_faults import CONFIG, GROUP, HEAD_DIM, KV_HEADS, LAYERS, SCALE, Served

NEW = [5, 30, 3]  # new tokens of three requests: the second has too many to recall
RECALLS = [True, False, True]


class Prefilled(Served):
    """A prefill of three requests that found 640 tokens each, in layers that write keys and values as they go."""

    def __init__(self, **changes: Any) -> None:
        super().__init__([700], msgspec.structs.replace(CONFIG, recall_extend_tokens=20, **changes))
        self.decode()
        extends = [found(self.scene, row, 1, 640, new) for row, new in zip((2, 3, 4), NEW, strict=True)]
        self.step = self.engine.begin_extend(extends)
        tokens = sum(NEW)
        self.batch: Any = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            batch_size=3,
            extend_seq_lens_cpu=NEW,
            extend_seq_lens=torch.tensor(NEW),
            extend_prefix_lens=torch.full((3,), 640),
            req_pool_indices=torch.tensor([2, 3, 4]),
        )
        self.q = self.scene.queries(tokens, KV_HEADS * GROUP)
        self.kv = [torch.randn(tokens, KV_HEADS, HEAD_DIM, generator=self.scene.generator) for _ in range(2)]
        slots = [self.scene.slots(row, 640 + new) for row, new in zip((2, 3, 4), NEW, strict=True)]
        self.slots, self.new_slots = slots, torch.cat([s[640:] for s in slots])

    def _write(self, k: torch.Tensor, v: torch.Tensor, layer: Any, batch: Any, save: bool) -> None:
        for buffers, rows in ((self.scene.keys, k), (self.scene.values, v)):
            buffers[layer.layer_id][self.new_slots] = rows

    def layers_of(self) -> list[torch.Tensor]:
        """What each layer gives, [tokens, heads, D]."""
        self.backend._write = self._write  # type: ignore[method-assign]
        for buffer in (*self.scene.keys, *self.scene.values):
            buffer[self.new_slots] = torch.nan
        with patch.object(runtime, "_extend", self.step):
            self.backend.init_forward_metadata(self.batch)
        k, v = self.kv
        given = [self.backend.forward_extend(self.q.flatten(1), k, v, layer, self.batch) for layer in self.layers]
        return [output.unflatten(1, self.q.shape[1:]) for output in given]

    def exact(self, layer: int) -> list[torch.Tensor]:
        """What dense attention gives each request in a layer."""
        keys, values = self.scene.keys[layer], self.scene.values[layer]
        parts = self.q.split(NEW)
        return [extend(part, keys, values, slots, SCALE) for part, slots in zip(parts, self.slots, strict=True)]


def test_requests_of_one_batch_recall_or_do_not() -> None:
    served = Prefilled()
    assert served.step is not None and served.step.recalls.tolist() == RECALLS
    for layer, output in enumerate(served.layers_of()):
        for given, exact, recalls in zip(output.split(NEW), served.exact(layer), RECALLS, strict=True):
            assert torch.equal(given, exact) is not recalls
            assert (given - exact).norm() < 0.5 * exact.norm(), "it is its own attention, approximated"
    served.engine.count_step()
    counters = served.engine.counters
    assert (counters.recalled_extends, counters.recalled_extend_tokens) == (2, 8) and not counters.faults
    assert served.backend._extend is not None
    with patch.object(runtime, "_extend", None):
        served.backend.init_forward_metadata(served.batch)
    assert served.backend._extend is None, "the next prefill has lists of its own"


def test_layers_that_never_recall_attend_to_everything() -> None:
    served = Prefilled(dense_layers=1)
    first, second, _ = served.layers_of()
    assert torch.equal(first, torch.cat(served.exact(0))) and not torch.equal(second, torch.cat(served.exact(1)))


@pytest.mark.parametrize("operation", ["run", "note_mass"])
def test_from_a_layer_that_fails_on_all_attend_to_everything(operation: str) -> None:
    clean = Prefilled().layers_of()
    for n in range(1, LAYERS + 1):
        served = Prefilled()
        with patch.object(CpuDecoder, operation, Nth(getattr(CpuDecoder, operation), n, True)):
            outputs = served.layers_of()
        for layer, output in enumerate(outputs):
            expected = clean[layer] if layer < n - 1 else torch.cat(served.exact(layer))
            assert torch.equal(output, expected), f"layer {layer} of fault {n}"
        served.engine.count_step()
        assert served.engine.counters.faults == {"layer": 1} and served.engine.counters.recalled_extends == 0
        assert served.counted()[1].get("fault") is None, "no decode step failed"


def test_a_prompt_that_recalls_can_be_asked_about() -> None:
    """Its row was walked before, and is looked at again after: what it wrote is clustered as a prompt's rest is."""
    config = ClusterKVConfig(budget_tokens=64, candidate_tokens=128, segment_tokens=256, recall_extend_tokens=300)
    served = Served([700], config)
    served.decode()
    assert served.engine.begin_extend([found(served.scene, 2, 1, 640, 200)]) is not None
    step = served.scene.decode([2], [841])
    assert step.sparse is not None
    borders = [(segment.begin, segment.end) for segment in served.engine.records.rows[2].segments]
    assert borders[-1][1] == (840 // 16 - 4) * 16 and borders[0][0] == 16
