"""Compiles numba's kernels for the models that tests serve, two at a time: servers that start at once would each do it.

python -m tests.support.warm
"""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.warmup import compile_kernels
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decoder_cpu import all_inside
from sglang_clusterkv.kernels.token_tiles_cpu import compile_tiles
from sglang_clusterkv.memory import movement
from tests.kernels import test_decoder_cpu
from tests.serving.matrix.architectures import ARCHITECTURES
from tests.support.tiny_model import SHAPE

TOGETHER = 2
KV_HEADS = 2  # nothing is compiled for their number
POOLS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Served(NamedTuple):
    """What kernels are compiled for."""

    group: int
    head_dim: int
    pool: torch.dtype = torch.float32
    host_dtype: str | None = None  # of a host tier


TINY = Served(SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"], SHAPE["head_dim"])
DEMO = Served(3, 64)


def served() -> list[Served]:
    """What tests serve, each once; those of a host tier serve the tiny model."""
    found = {DEMO: None, TINY: None, TINY._replace(host_dtype="auto"): None}
    for one in ARCHITECTURES:
        if one.outcome == "works":
            pool = POOLS.get(one.arguments.get("kv_cache_dtype", ""), torch.float32)
            found[Served(one.heads // one.kv_heads, one.head_dim, pool)] = None
    return [*found]


def warm(kind: list[Served]) -> None:
    """Compile for these in one process, in float32, as the tiny model's server has it: they have functions in common."""
    for one in kind:
        compile_kernels(
            movement.resolve(ClusterKVConfig(trace=True), "cpu"),
            "cpu",
            page_size=16,
            kv_heads=KV_HEADS,
            group=one.group,
            head_dim=one.head_dim,
            dtype=one.pool,
            query_dtype=torch.float32,
            context_tokens=8192,
            host_dtype=one.host_dtype,
        )


def warm_layers() -> None:
    """Compile what a decoder layer has around attention, whatever its sizes, with weights in both formats.

    Whether it is right the test says that is called here.
    """
    compile_tiles()
    all_inside(np.zeros(1, np.int64), 1)
    for case in test_decoder_cpu.CASES:
        with suppress(AssertionError):
            test_decoder_cpu.test_calls_give_what_their_parts_give(case, tokens=3, threads=1)


def main() -> None:
    """Those of most first, then of the widest heads, so that no process is left alone with one of them at the end.

    What all of them have in common is compiled by the process that does not begin with decoder layers.
    """
    kinds: dict[tuple[int, int], list[Served]] = {}
    for one in served():
        kinds.setdefault((one.group, one.head_dim), []).append(one)
    order = sorted(kinds.values(), key=lambda kind: (len(kind), kind[0].head_dim), reverse=True)
    with multiprocessing.get_context("spawn").Pool(TOGETHER) as pool:
        layers = pool.apply_async(warm_layers)
        pool.map(warm, order, chunksize=1)
        layers.get()


if __name__ == "__main__":
    main()
