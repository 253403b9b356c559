"""Any configuration that is accepted serves: prompts are clustered, short and long requests decode, densely and sparsely.

Drawn from the table that validates (config.py, LIMITS), its ends more often than what lies between. Red when a configuration
passes `validate` and then has a fault, an output that is not a number, or makes no sparse step where it should.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_clusterkv.clusters.warmup import compile_kernels
from sglang_clusterkv.config import LIMITS, ClusterKVConfig, ConfigError, Limit, fit_defaults, validate
from sglang_clusterkv.kernels.attend import dense_decode
from tests.support.scenes import Scene

KV_HEADS, GROUP, HEAD_DIM, LAYERS, SCALE = 2, 2, 32, 2, 0.3
PAGE_SIZES = [2, 4, 16, 48, 64]
# Each is a compilation; tests/kernels/test_decode_cpu.py has the other pairs.
FORMATS = [
    {"centroid_dtype": "int4", "code_bits": 2},
    {"centroid_dtype": "int8", "code_bits": 2},
    {"centroid_dtype": "bf16", "code_bits": 1},
]
MOST_TOKENS = 2500  # of a prompt here
SEEN: Counter[str] = Counter()


def numbers(limit: Limit, default: float, page_size: int) -> st.SearchStrategy[Any]:
    """Values of one row of the table: its ends, the default, and what lies near."""
    if limit.pages:
        most = int(limit.most) // page_size
        pages = st.sampled_from([int(limit.least), most, *range(int(limit.least), min(most, 20))])
        return pages.map(lambda count: count * page_size)
    if isinstance(default, float):
        return st.one_of(st.sampled_from([limit.least, default, limit.most]), st.floats(limit.least, limit.most))
    near = st.integers(int(limit.least), int(min(limit.most, max(4 * default, 8))))
    return st.one_of(st.sampled_from([int(limit.least), default, int(limit.most)]), near)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[ClusterKVConfig, int]:
    """A configuration and a page size that were accepted together."""
    defaults, page_size = msgspec.structs.asdict(ClusterKVConfig()), draw(st.sampled_from(PAGE_SIZES))
    changes = {
        "refine": draw(st.booleans()),
        "estimate": draw(st.booleans()),
        "merge_segments": draw(st.booleans()),
        **draw(st.sampled_from(FORMATS)),
        "tokens_per_cluster": draw(st.sampled_from([d for d in range(1, page_size + 1) if page_size % d == 0])),
    }
    for name in draw(st.sets(st.sampled_from(sorted(LIMITS)), max_size=5)) - {"tokens_per_cluster"}:
        changes[name] = draw(numbers(LIMITS[name], defaults[name], page_size))
    if "budget_tokens" not in changes:
        changes["budget_tokens"] = draw(st.integers(1, 100))
    for least, most in (("budget_tokens", "candidate_tokens"), ("recluster_every", "segment_tokens")):
        low, high = (changes.get(name, defaults[name]) for name in (least, most))
        if low > high:
            changes[least] = high if least == "budget_tokens" else high // page_size * page_size
    if changes.get("host_ratio", 1) > 1:
        changes["dense_layers"] = 0
    if changes.get("recall_extend_tokens", 0) > 0:
        changes["reproducible"] = False
    config = fit_defaults(ClusterKVConfig(**changes), page_size)
    validate(config, page_size, HEAD_DIM)
    return config, page_size


def serve(config: ClusterKVConfig, page_size: int) -> None:
    """Prefill two prompts, decode them, and again after as many tokens as make a segment."""
    segment = min(config.segment_tokens, 20 * page_size)
    long = min(MOST_TOKENS, config.sink_tokens + 3 * segment + config.window_tokens + page_size // 2)
    lengths = [max(long, 7 * page_size), page_size + 1]
    more = min(config.recluster_every + config.window_tokens, 600)
    pages = -(-(sum(lengths) + 2 * more + 20) // page_size) + 4
    scene = Scene(
        config, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, pages=pages, rows=3, context=lengths[0] + more + 20,
        page_size=page_size,
    )  # fmt: skip
    for row, length in enumerate(lengths, 1):
        scene.prefill(row, length)
    q = scene.queries(2, KV_HEADS * GROUP)
    for jump in (0, 0, more, 0, 0):
        for row, length in enumerate(lengths, 1):
            scene.write(row, length, length + jump)
        lengths = [length + jump + 1 for length in lengths]
        step = scene.decode([1, 2], lengths)
        for layer in range(LAYERS):
            keys, values = scene.keys[layer], scene.values[layer]
            at = {"sparse": step.sparse_at, "dense": step.dense_at}
            if step.sparse is not None:
                SEEN["sparse"] += 1
                output = scene.engine.sparse_layer(q, keys, values, layer, step, SCALE)
                assert output is not None, "a layer failed"
                assert output[slice(None) if at["sparse"] is None else at["sparse"]].isfinite().all()
            if step.dense is not None:
                SEEN["dense"] += 1
                rows = q if at["dense"] is None else q[at["dense"]]
                dense = dense_decode(rows, keys, values, step.dense.slots, step.dense.seq_lens, SCALE)
                assert dense.isfinite().all()
    info: Any = scene.engine.server_info()
    assert not info["faults"] and not info["build_conflicts"], info
    assert info["sparse_steps"] + sum(info["dense_steps"].values()) == 10
    SEEN["segments"] += info["segments"]
    assert np.isfinite(scene.index.mass.numpy()).all()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(configurations())
def serve_any(drawn: tuple[ClusterKVConfig, int]) -> None:
    serve(*drawn)


@pytest.mark.slow
def test_any_accepted_configuration_serves() -> None:
    SEEN.clear()
    serve_any()
    assert min(SEEN["sparse"], SEEN["dense"], SEEN["segments"]) >= 20, SEEN


def ends(name: str) -> list[tuple[Any, Any]]:
    """The two ends of a row at pages of 16 tokens, and what lies just beyond each."""
    limit = LIMITS[name]
    if name == "tokens_per_cluster":
        return [(1, 0), (16, 17)]
    if limit.pages:
        least, most = int(limit.least) * 16, int(limit.most) // 16 * 16
        return [(least, least - 16), (most, most + 16)]
    step = 1 if isinstance(getattr(SMALL, name), int) else 0.001
    return [(limit.least, limit.least - step), (limit.most, limit.most + step)]


SMALL = ClusterKVConfig(budget_tokens=32, candidate_tokens=64, segment_tokens=256, recluster_every=64)


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_the_ends_of_every_row_serve_and_nothing_beyond(name: str) -> None:
    for value, beyond in ends(name):
        changes = {name: type(getattr(SMALL, name))(value)}
        if name == "recluster_every":
            changes["segment_tokens"] = max(value, SMALL.segment_tokens)
        if name == "segment_tokens":
            changes["recluster_every"] = min(value, SMALL.recluster_every)
        if name == "candidate_tokens":
            changes["budget_tokens"] = min(value, SMALL.budget_tokens)
        if name == "budget_tokens":
            changes["candidate_tokens"] = max(value, SMALL.candidate_tokens)
        config = msgspec.structs.replace(SMALL, **changes)
        validate(config, 16, HEAD_DIM)
        serve(config, 16)
        with pytest.raises(ConfigError, match=f"{name}="):
            validate(msgspec.structs.replace(config, **{name: beyond}), 16, HEAD_DIM)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [2, 8184])
def test_the_smallest_and_the_largest_page_serve(page_size: int) -> None:
    config = ClusterKVConfig(
        tokens_per_cluster=page_size // 2, budget_tokens=64, candidate_tokens=4096, kmeans_passes=1
    )
    config = fit_defaults(config, page_size)
    validate(config, page_size, HEAD_DIM)
    serve(config, page_size)


def test_the_warm_up_takes_no_memory_for_what_a_configuration_only_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when a start with long sinks or windows makes a pool of their length."""
    made, randn = [], torch.randn

    def watched(*shape: Any, **kwargs: Any) -> torch.Tensor:
        made.append(int(np.prod(shape[0] if isinstance(shape[0], tuple) else shape)))
        return randn(*shape, **kwargs)

    monkeypatch.setattr(torch, "randn", watched)
    config = ClusterKVConfig(sink_tokens=65536, window_tokens=65536, budget_tokens=32768, candidate_tokens=32768)
    compile_kernels(
        config, "cpu", page_size=16, kv_heads=KV_HEADS, group=GROUP, head_dim=HEAD_DIM, dtype=torch.float32,
        context_tokens=10**6,
    )  # fmt: skip
    assert max(made) < 5000 * KV_HEADS * HEAD_DIM
