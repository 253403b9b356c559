"""Which layers of a model are clustered, as its pool is sized and made.

Red when: a layer that recalls has no clusters, or one that never does has some; bytes per token count others than there are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.serving import layers

SLIDING = {"sliding_window_size": 512}


def model_of(*kinds: dict[str, Any]) -> torch.nn.Module:
    """A model whose layers have these arguments beside their number, unless they name another one's."""
    made = [{"layer_id": number} | kind for number, kind in enumerate(kinds)]
    return torch.nn.ModuleList(RadixAttention(2, 64, 0.1, num_kv_heads=1, **kind) for kind in made)


@pytest.mark.parametrize(
    ("kinds", "fields", "clustered"),
    [
        ([{}, {}, {}], {}, (0, 1, 2)),
        ([SLIDING, SLIDING, {}, SLIDING], {}, (2,)),
        ([{"logit_cap": 30.0}, {}], {}, (1,)),
        ([{}, {}, SLIDING], {"dense_layers": 1}, (1,)),
        # Gemma 3n's last layers read the KV of others by these numbers: nothing is written to their own.
        ([SLIDING, {}, SLIDING | {"layer_id": 0}, {"layer_id": 1}], {}, (1,)),
        ([SLIDING], {}, ()),
        ([], {}, None),
    ],
)
def test_layers_that_never_recall_are_not_clustered(
    kinds: list[dict[str, Any]], fields: dict[str, Any], clustered: tuple[int, ...] | None
) -> None:
    count = layers.note_clustered(model_of(*kinds), ClusterKVConfig(**fields), 0, max(3, len(kinds)))
    assert layers.clustered() == clustered
    assert count == (3 if clustered is None else len(clustered))


def test_a_model_in_the_implementation_of_transformers_has_its_layers_beside_it() -> None:
    model = torch.nn.Module()
    model.attention_instances = dict(enumerate(model_of(SLIDING, {})))
    assert layers.note_clustered(model, ClusterKVConfig(), 0, 2) == 1 and layers.clustered() == (1,)


def test_the_pool_is_sized_by_what_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own bytes per token, and those of the one layer that recalls."""
    from sglang.srt import runtime_context
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from sglang_clusterkv.serving import active, scheduler_hooks
    from sglang_clusterkv.serving.pool import ClusterKVPool

    monkeypatch.setattr(active, "active_config", ClusterKVConfig)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dcp_size=1))
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: SimpleNamespace(page_size=16))
    model_config = SimpleNamespace(get_num_kv_heads=lambda *_: 2, head_dim=32)
    kvc = SimpleNamespace(
        model=model_of(SLIDING, {}, SLIDING), model_config=model_config, layer_info=SimpleNamespace(start_layer=0)
    )
    told = scheduler_hooks._after_cell_size(0, None, kvc, 3)

    pool = object.__new__(ClusterKVPool)
    pool.size, pool.page_size, pool.layer_num, pool.head_num, pool.head_dim = 7 * 16, 16, 3, 2, 32
    pool.config, pool.device = ClusterKVConfig(), "cpu"
    pool.k_buffer, pool.v_buffer = [], []
    monkeypatch.setattr(MHATokenToKVPool, "_create_buffers", lambda self: None)
    pool._create_buffers()
    index = pool.cluster_index
    assert index is not None and index.geometry.clustered_layers == (1,)
    assert 0 <= told * index.geometry.slots - index.bytes < index.geometry.slots
