"""What the index costs is what the documentation says, and what SGLang's pool sizing is told.

Red when: an array is added or widened without the accounting, or the share of the KV passes its limit.
"""

from __future__ import annotations

import pytest

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import Geometry, index_bytes, metadata_bytes_per_token
from sglang_clusterkv.memory.index import ClusterIndex

LLAMA_8B = {"layers": 32, "kv_heads": 8, "head_dim": 128}


def test_the_index_takes_at_most_13_percent_of_the_kv_at_head_dim_128() -> None:
    per_token = metadata_bytes_per_token(ClusterKVConfig(), page_size=16, **LLAMA_8B)
    keys_and_values = 2 * 2 * LLAMA_8B["layers"] * LLAMA_8B["kv_heads"] * LLAMA_8B["head_dim"]
    assert 0.12 < per_token / keys_and_values <= 0.13


@pytest.mark.parametrize("fields", [{}, {"centroid_dtype": "bf16"}, {"code_bits": 1}, {"refine": False}])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_the_accounting_is_what_is_allocated(fields: dict[str, object], head_dim: int) -> None:
    config = ClusterKVConfig(**fields)
    geometry = Geometry(layers=2, kv_heads=3, head_dim=head_dim, page_size=16, pages=7)
    index = ClusterIndex(config, geometry, "cpu")
    assert index.bytes == index_bytes(config, geometry)
    told = metadata_bytes_per_token(config, page_size=16, head_dim=head_dim, kv_heads=3, layers=2)
    assert index.bytes <= told * geometry.slots < index.bytes + geometry.slots


def test_layers_without_clusters_take_no_bytes() -> None:
    """Gemma 3 27B, whose every sixth layer recalls: 10 of 62."""
    gemma = {"kv_heads": 16, "head_dim": 128}
    whole, part = (metadata_bytes_per_token(ClusterKVConfig(), page_size=16, layers=n, **gemma) for n in (62, 10))
    assert part < whole / 5
    pages = 8
    geometry = Geometry(62, **gemma, page_size=16, pages=pages, clustered=tuple(range(5, 62, 6)))
    states = 3 * 4 * pages  # of pages, once for all layers
    of_all = index_bytes(ClusterKVConfig(), Geometry(62, **gemma, page_size=16, pages=pages))
    assert len(geometry.clustered_layers) == 10
    assert 62 * (index_bytes(ClusterKVConfig(), geometry) - states) == 10 * (of_all - states)


def test_without_refining_no_codes_are_kept() -> None:
    geometry = Geometry(layers=1, kv_heads=1, head_dim=64, page_size=16, pages=4)
    assert index_bytes(ClusterKVConfig(refine=False), geometry) < index_bytes(ClusterKVConfig(code_bits=1), geometry)
