"""The kernels that a server runs are compiled when it starts, whatever its configuration.

Red when: the warm-up decodes densely, or misses a configuration that the server accepts.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.clusters.warmup import compile_cpu_kernels
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.refine.cpu import value_kernel


@pytest.mark.parametrize(
    "fields",
    [{}, {"dense_below_tokens": 10**6}, {"refine": False}, {"budget_tokens": 8192, "candidate_tokens": 8192}],
)
def test_any_configuration_is_warmed_up(fields: dict[str, object]) -> None:
    config = ClusterKVConfig(**fields)
    compile_cpu_kernels(config, page_size=16, kv_heads=2, group=3, head_dim=64, dtype=torch.float32)
    assert value_kernel(64, 3, 2).signatures or not config.refine
