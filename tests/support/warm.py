"""Compiles numba's kernels for the models that tests serve, two at a time: servers that start at once would each do it.

python -m tests.support.warm
"""

from __future__ import annotations

import multiprocessing
from typing import NamedTuple

import torch

from sglang_clusterkv.clusters.warmup import compile_kernels
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory import movement
from tests.serving.matrix.architectures import ARCHITECTURES
from tests.support.tiny_model import SHAPE

TOGETHER = 2
POOLS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Served(NamedTuple):
    """What kernels are compiled for."""

    group: int
    head_dim: int
    kv_heads: int
    pool: torch.dtype = torch.float32
    host_dtype: str | None = None  # of a host tier


TINY = Served(
    SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"], SHAPE["head_dim"], SHAPE["num_key_value_heads"]
)
DEMO = Served(3, 64, 3)


def of_matrix() -> list[Served]:
    """What the architectures of the matrix have, each once."""
    found = {}
    for one in ARCHITECTURES:
        if one.outcome == "works":
            pool = POOLS.get(one.arguments.get("kv_cache_dtype", ""), torch.float32)
            served = Served(one.heads // one.kv_heads, one.head_dim, one.kv_heads, pool)
            found[served.group, served.head_dim, pool] = served
    return [*found.values()]


def warm(served: Served) -> None:
    """Compile for one of them, in float32, as the tiny model's server has it."""
    compile_kernels(
        movement.resolve(ClusterKVConfig(trace=True), "cpu"),
        "cpu",
        page_size=16,
        kv_heads=served.kv_heads,
        group=served.group,
        head_dim=served.head_dim,
        dtype=served.pool,
        query_dtype=torch.float32,
        context_tokens=8192,
        host_dtype=served.host_dtype,
    )


def main() -> None:
    """The tests of a host tier serve the tiny model."""
    with multiprocessing.get_context("spawn").Pool(TOGETHER) as pool:
        pool.map(warm, [DEMO, TINY, TINY._replace(host_dtype="auto"), *of_matrix()], chunksize=1)


if __name__ == "__main__":
    main()
