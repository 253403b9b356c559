"""Compiles numba's kernels for the models of the servers, on one core: two servers that start at once would each do it.

python -m tests.support.warm
"""

from __future__ import annotations

import torch

from sglang_clusterkv.clusters.warmup import compile_kernels
from sglang_clusterkv.config import ClusterKVConfig
from tests.support.tiny_model import SHAPE

TINY = (SHAPE["num_key_value_heads"], SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"], SHAPE["head_dim"])
DEMO = (3, 3, 64)


def main() -> None:
    """Both models, in the servers' dtype; the tests of a host tier serve the tiny one."""
    for (kv_heads, group, head_dim), host_dtype in ((DEMO, None), (TINY, None), (TINY, "auto")):
        compile_kernels(
            ClusterKVConfig(trace=True),  # as the tiny model's server has it
            "cpu",
            page_size=16,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            dtype=torch.float32,
            context_tokens=8192,
            host_dtype=host_dtype,
        )


if __name__ == "__main__":
    main()
