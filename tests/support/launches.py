"""What Triton would compile for launches, found out without a GPU: its launcher runs up to the point where it compiles.

Run as a process of its own, in which kernels are not interpreted:

    python -m tests.support.launches

prints, as JSON, how many kernels the warm-up of each server compiles that none before it has, and which are compiled after
these: [occasion, kernel]. The first server has the defaults and a short context, the last one a context of a million tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton

from benchmarks.gpu.dry import NoGpu
from sglang_clusterkv.clusters import build, building, decoding, warmup
from sglang_clusterkv.clusters.build import write_in_place
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import tier as moves
from sglang_clusterkv.kernels.attend.triton import dense_decode
from sglang_clusterkv.kernels.decode.triton import decoder_of, sparse_decode
from sglang_clusterkv.kernels.tier import triton as moving
from sglang_clusterkv.memory.device import index_pages
from sglang_clusterkv.memory.host import HOST_DTYPES
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.tier import PREFILL_HOST, Tier
from tests.support import flashinfer_stand_in as stand_in
from tests.support.scenes import PAGE, Scene, Tiers

HEADS, GROUP, HEAD_DIM, DTYPE = 2, 4, 128, torch.bfloat16
CONTEXT = 10240


class Compiled:
    """The kernels that Triton was about to compile, each once; nothing is compiled or launched."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self.late: list[tuple[str, str]] = []
        self.occasion = ""
        triton.runtime.driver.set_active(NoGpu())
        triton.knobs.runtime.jit_cache_hook = self._hook

    def _hook(self, *, key: str, fn: Any, **_: Any) -> bool:
        if (fn.name, key) not in self.seen:
            self.seen.add((fn.name, key))
            self.late.append((self.occasion, fn.name))
        return True


def build_segments(
    index: ClusterIndex, ids: list[int], segments: list[torch.Tensor], keys: Any, values: Any, tier: Tier | None = None
) -> None:
    """What `build.build_segments` does on a GPU."""
    write_in_place(index, segments, keys, values, tier)
    index.mark(ids, [slots[::PAGE] // PAGE for slots in segments])


def decode(
    config: ClusterKVConfig,
    lengths: list[int],
    waiting: int = 0,
    dtype: torch.dtype = DTYPE,
    host_dtype: str | None = None,
    sinks: bool = False,
) -> None:
    """One sparse and one dense step of the second of two layers, for requests of these lengths, and tokens that wait.

    With a host tier of this format also what moves pages, and what a prefill reads.
    """
    pages = index_pages(sum(lengths) // PAGE + 2 * len(lengths) + 1)
    scene = Scene(
        config, layers=2, kv_heads=HEADS, head_dim=HEAD_DIM, pages=pages, rows=len(lengths) + 1, context=CONTEXT,
        dtype=DTYPE, tiers=None if host_dtype is None else Tiers(pages - 1, 1, host_dtype),
    )  # fmt: skip
    rows = [*range(1, len(lengths) + 1)]
    for row, length in zip(rows, lengths, strict=True):
        scene.prefill(row, length - 1)
    step = scene.decode(rows, [length + waiting for length in lengths])
    assert step.sparse is not None and step.dense is None, "it must decode sparsely"
    q = torch.zeros(len(rows), HEADS * GROUP, HEAD_DIM, dtype=dtype)
    layer: dict[str, Any] = dict(scene.engine.residency.layer(1))
    if sinks:
        layer["sinks"] = torch.zeros(HEADS * GROUP, dtype=torch.bfloat16)
    sparse_decode(q, scene.keys[1], scene.values[1], scene.index, 1, step.sparse, 0.1, **layer)
    slots = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    dense_decode(q, scene.keys[1], scene.values[1], slots, torch.tensor(lengths), 0.1, **layer)
    if scene.tier is not None:
        for count in (1, 16, 21):
            some = torch.arange(count + 1)[1:]
            moves.store(scene.tier, some, some)
            moves.fetch(scene.tier, some, some)
            workspace = torch.empty(2, 1, count, HEADS, HEAD_DIM, dtype=DTYPE)
            moves.gather(scene.tier, 1, some, *workspace, PREFILL_HOST)


def captured(config: ClusterKVConfig, batch: int) -> None:
    """A layer of a captured step, and one that is made where it reads."""
    pages = index_pages(1500 // PAGE + 3)
    scene = Scene(
        config, layers=2, kv_heads=HEADS, head_dim=HEAD_DIM, pages=pages, rows=2, context=CONTEXT, dtype=DTYPE
    )  # fmt: skip
    scene.prefill(1, 1500)
    scene.engine.begin_decode(np.array([1]), np.array([1500]))
    scene.engine.decoding._group = GROUP
    scene.engine.decoding.reserve(batch, CONTEXT)
    step = scene.decode([1], [1501])
    assert step.sparse is not None and step.too_large is None
    for lists in (scene.engine.decoding.captured(batch), step.sparse):
        q = torch.zeros(lists.batch, HEADS * GROUP * 3, HEAD_DIM, dtype=DTYPE)[:, : HEADS * GROUP]
        sparse_decode(q, scene.keys[1], scene.values[1], scene.index, 1, lists, 0.1)


def cluster(config: ClusterKVConfig, lengths: list[int]) -> None:
    """Segments of these lengths, in one call."""
    pages = sum(lengths) // PAGE + 1
    scene = Scene(config, layers=2, kv_heads=HEADS, head_dim=HEAD_DIM, pages=index_pages(pages), dtype=DTYPE)
    segments = torch.arange(PAGE, PAGE + sum(lengths)).split(lengths)
    write_in_place(scene.index, list(segments), scene.keys, scene.values)


def warm_up(
    config: ClusterKVConfig, query_dtype: torch.dtype, host_dtype: str | None = None, sinks: bool = False,
    context_tokens: int = CONTEXT,
) -> None:  # fmt: skip
    """What a server does at start."""
    warmup.compile_kernels(
        config,
        "cpu",
        page_size=PAGE,
        kv_heads=HEADS,
        group=GROUP,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        context_tokens=context_tokens,
        query_dtype=query_dtype,
        host_dtype=host_dtype,
        sinks=sinks,
    )


@contextmanager
def flashinfer_attends() -> Iterator[ClusterKVConfig]:
    """A configuration with which FlashInfer attends; its own launches are not made."""
    with pytest.MonkeyPatch.context() as patched:
        stand_in.install(patched, HEADS)
        patched.setattr(stand_in.Attention, "run", lambda *_: None)
        patched.setattr(decoding, "capture", lambda index, group, lists: decoder_of(index, group).capture(lists))
        yield ClusterKVConfig(attend_engine="flashinfer")


def main() -> None:
    """Warm up, then everything else."""
    compiled = Compiled()
    at_start: list[int] = []
    late: list[tuple[str, str]] = []
    own, half = ClusterKVConfig(estimate_clusters=100), torch.float16
    # Requests with fewer clusters than have their own mean value, and more; a model in another dtype than its KV.
    for config, dtype in ((ClusterKVConfig(), DTYPE), (own, DTYPE), (ClusterKVConfig(), half)):
        warm_up(config, dtype)
        at_start.append(len(compiled.late))
        compiled.late.clear()
        for lengths in ([700], [3001], [9000], [701, 1500], [2000, 900, 5017], [1000] * 8, [777] * 33):
            compiled.occasion = (
                f"decode {lengths[:8]}, estimate_clusters {config.estimate_clusters}, queries in {dtype}"
            )
            decode(config, lengths, dtype=dtype)
        late += compiled.late
        compiled.late.clear()
    for host_dtype in HOST_DTYPES:
        warm_up(ClusterKVConfig(), DTYPE, host_dtype)
        at_start.append(len(compiled.late))
        compiled.late.clear()
        for lengths in ([700], [9000], [701, 1500]):
            compiled.occasion = f"decode {lengths} over a host tier, {host_dtype}"
            decode(ClusterKVConfig(), lengths, host_dtype=host_dtype)
        late += compiled.late
        compiled.late.clear()
    warm_up(ClusterKVConfig(), DTYPE, sinks=True)
    at_start.append(len(compiled.late))
    compiled.late.clear()
    for lengths in ([700], [701, 1500]):
        compiled.occasion = f"decode {lengths} with sinks"
        decode(ClusterKVConfig(), lengths, sinks=True)
    for batch in (1, 5):
        compiled.occasion = f"a captured step of {batch}"
        captured(ClusterKVConfig(), batch)
    late += compiled.late
    compiled.late.clear()
    with flashinfer_attends() as config:
        warm_up(config, DTYPE)
        at_start.append(len(compiled.late))
        compiled.late.clear()
        for lengths in ([700], [701, 1500]):
            compiled.occasion = f"decode {lengths}, FlashInfer attends"
            decode(config, lengths)
        compiled.occasion = "a captured step, FlashInfer attends"
        captured(config, 3)
    for waiting in (500, 1000, 1800):
        compiled.occasion = f"decode, {waiting} tokens wait"
        decode(ClusterKVConfig(), [7000], waiting)
    for lengths in ([64], [80], [256], [272], [1008], [1024], [1024, 1024], [512, 64, 96]):
        compiled.occasion = f"cluster {lengths}"
        cluster(ClusterKVConfig(), lengths)
    late += compiled.late
    compiled.late.clear()
    warm_up(ClusterKVConfig(), DTYPE, context_tokens=1 << 20)
    at_start.append(len(compiled.late))
    print(json.dumps({"at_start": at_start, "late": late}))


if __name__ == "__main__":
    with (
        patch.object(build, "build_segments", build_segments),
        patch.object(building, "makes_several", lambda device: True),
        patch.object(moves, "_for", lambda tier: moving),
        patch.object(warmup, "_compiles_by_size", lambda device: True),
        patch.object(decoding, "takes_mixtures", lambda device: True),
        patch.object(warmup, "sparse_decode", sparse_decode),
        patch.object(warmup, "dense_decode", dense_decode),
        patch.object(warmup, "extend", lambda *_, **__: None),
    ):
        main()
