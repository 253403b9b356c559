"""An exception inside a layer costs speed, nothing else: each operation of the chain raises at its n-th call, through the
backend as SGLang calls it.

Red when: the exception reaches SGLang; a layer before it, or a dense request, gives something else than without it; this layer
or a later one does not attend to everything; it is not counted and said, or the step is counted as sparse, or twice; layers
that always fail are tried at every step, or never again.
"""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import dense_decode
from sglang_clusterkv.kernels.decode.cpu import CpuDecoder
from sglang_clusterkv.memory.step import dense_step
from sglang_clusterkv.serving import runtime
from sglang_clusterkv.serving.backend import ClusterKVAttnBackend
from tests.clusters.test_faults import Nth
from tests.support.scenes import Scene

CONFIG = ClusterKVConfig(budget_tokens=64, candidate_tokens=128, segment_tokens=256, estimate_clusters=16)
LAYERS, KV_HEADS, GROUP, HEAD_DIM, SCALE = 3, 2, 2, 32, 0.2
SPARSE, MIXED = [700, 400], [700, 50, 400]  # tokens of the requests
OPERATIONS = ["run", "note_mass"]


class Served:
    """An engine, and the backend before it, for requests of these lengths."""

    def __init__(
        self, lengths: list[int], config: ClusterKVConfig = CONFIG, dtype: torch.dtype = torch.float32
    ) -> None:
        self.scene = Scene(
            config, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, pages=400, context=4096, dtype=dtype
        )
        self.engine = self.scene.engine
        self.rows = [*range(1, len(lengths) + 1)]
        self.lengths = lengths
        for row, length in zip(self.rows, lengths, strict=True):
            self.scene.prefill(row, length)
        self.backend = object.__new__(ClusterKVAttnBackend)
        self.backend.req_to_token_pool = SimpleNamespace(req_to_token=self.scene.req_to_token)
        self.backend.token_to_kv_pool = SimpleNamespace(
            get_kv_buffer=lambda layer: (self.scene.keys[layer], self.scene.values[layer])
        )
        self.backend.engine = self.engine
        self.backend.first_layer, self.backend.prefill, self.backend._tier_prefill = 0, None, None
        self.backend._threads = self.backend._prefill_threads = torch.get_num_threads()
        self.backend._said = set()
        self.layers = [RadixAttention(KV_HEADS * GROUP, HEAD_DIM, SCALE, KV_HEADS, layer) for layer in range(LAYERS)]
        self.q = self.scene.queries(len(lengths), KV_HEADS * GROUP)
        self.steps = 0

    def decode(self) -> list[torch.Tensor]:
        """One step; what each layer gave, [B, heads, D]."""
        self.steps += 1
        self.lengths = [length + 1 for length in self.lengths]
        step = self.scene.decode(self.rows, self.lengths)
        batch: Any = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=len(self.rows))
        with patch.object(runtime, "_step", step):
            self.backend.init_forward_metadata(batch)
        outputs = [
            self.backend.forward_decode(self.q.flatten(1), self.q, self.q, layer, batch, save_kv_cache=False)
            for layer in self.layers
        ]
        return [output.unflatten(1, self.q.shape[1:]) for output in outputs]

    def dense(self) -> list[torch.Tensor]:
        """What the layers of the last step would give if all requests attended to everything."""
        lists = dense_step(np.array(self.rows), np.array(self.lengths), self.scene.req_to_token)
        pools = zip(self.scene.keys, self.scene.values, strict=True)
        return [dense_decode(self.q, keys, values, lists.slots, lists.seq_lens, SCALE) for keys, values in pools]

    def counted(self) -> tuple[int, dict[str, int], dict[str, int]]:
        """Sparse steps, dense steps and faults; each step of each request is one of the first two."""
        info: Any = self.engine.server_info()
        assert info["sparse_steps"] + sum(info["dense_steps"].values()) == self.steps * len(self.rows)
        return info["sparse_steps"], info["dense_steps"], info["faults"]


@pytest.mark.parametrize("lengths", [SPARSE, MIXED], ids=["all sparse", "mixed"])
@pytest.mark.parametrize("before", [True, False], ids=["before its work", "after its work"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_nth_call_raises(
    operation: str, before: bool, lengths: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    clean = Served(lengths).decode()
    for n in range(1, LAYERS + 1):
        caplog.clear()
        served = Served(lengths)
        nth = Nth(getattr(CpuDecoder, operation), n, before)
        with patch.object(CpuDecoder, operation, nth), caplog.at_level(logging.WARNING):
            outputs = served.decode()
        assert nth.calls == n, "layers after it go the dense way"
        dense = served.dense()
        for layer, output in enumerate(outputs):
            assert torch.equal(output, clean[layer] if layer < n - 1 else dense[layer]), f"layer {layer} of fault {n}"
        sparse, reasons, faults = served.counted()
        assert sparse == 0 and reasons["fault"] == 2 and faults == {"layer": 1}
        assert served.engine.counters.tokens_recalled == served.engine.counters.tokens_available == 0
        # A layer that failed notes no mass, unless that was its last work.
        noted = n if (operation, before) == ("note_mass", False) else n - 1
        assert (served.scene.index.mass[:, 1] > 0).tolist() == [layer < noted for layer in range(LAYERS)]
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1 and "layer failed (RuntimeError: a fault of the test)" in warnings[0]


def _fields(config: ClusterKVConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_memory_of_a_layer_that_ran_short_is_free_when_it_goes_the_dense_way() -> None:
    class Short(MemoryError):
        pass

    served, alive = Served(SPARSE), []
    dense_of_all = served.backend._dense_of_all

    def fails(*_: Any) -> torch.Tensor:
        error = Short()
        alive.append(weakref.ref(error))
        raise error

    def watched(step: Any) -> Any:
        gc.collect()
        alive[-1] = alive[-1]() is not None
        return dense_of_all(step)

    served.backend._dense_of_all = watched  # type: ignore[method-assign]
    served.engine.sparse_decode = fails
    for _ in range(8):
        served.decode()
    assert len(alive) == 3 and alive[1:] == [False, False], "the first one is in the log"


def test_layers_that_always_fail_are_tried_less_and_less_and_serve_again() -> None:
    served = Served([1500, 900])
    working = served.engine.sparse_decode

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("a fault of the test")

    served.engine.sparse_decode = fails
    for _ in range(100):
        served.decode()
    sparse, reasons, faults = served.counted()
    assert sparse == 0 and reasons == {"fault": 200} and 4 <= faults["layer"] <= 8, faults
    served.engine.sparse_decode = working
    for _ in range(128):
        served.decode()
        if served.engine._under_way and served.engine._under_way.sparse:
            break
    served.engine.sparse_decode = fails
    before = served.counted()[2]["layer"]
    served.decode()
    for _ in range(2):
        served.decode()
    sparse, _, faults = served.counted()
    assert sparse == 2, "it decodes sparsely again as soon as a try went well"
    assert faults["layer"] == before + 2, "and the next fault is waited for as the first was"


def test_layers_that_go_the_dense_way_are_counted_once_they_have() -> None:
    served = Served(SPARSE, ClusterKVConfig(**(_fields(CONFIG) | {"dense_layers": 1})))
    served.decode()
    assert served.engine.counters.dense_layer_calls == {"first_layers": 2}

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("a fault of the test")

    served.backend._dense = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):  # what is dense has no other way
        served.decode()
    assert served.engine.counters.dense_layer_calls == {"first_layers": 2}
