"""Score's kernel gives what the torch reference gives, tile by tile.

Red when: a row, segment, head or query head is mixed up, a format is unpacked wrongly, an empty or padding cluster counts, a
log-sum-exp misses a tile, something is read that nobody wrote, or something is written outside its tensor.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from msgspec.structs import replace

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode.triton import TritonDecoder
from sglang_clusterkv.kernels.score.reference import exact_logits, score, segment_vectors
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS, Workspace
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.rotation import rotation_matrix
from sglang_clusterkv.memory.step import SparseStep
from tests.support.filled import SCALE, Guarded, assert_close, index_on, of_request, step_on
from tests.support.scenes import Scene

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


@functools.cache
def scene_of(config: ClusterKVConfig, head_dim: int, dtype: torch.dtype, kv_heads: int) -> tuple[Scene, SparseStep]:
    """Three requests; the longest has two tiles of clusters, whose border is inside a segment."""
    scene = Scene(config, layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, pages=256, context=4096)
    lengths = [700, 333, 2200]
    for row, length in enumerate(lengths, 1):
        scene.prefill(row, length)
    step = scene.decode([1, 2, 3], [length + 1 for length in lengths])
    assert step.sparse is not None and step.dense is None, "the scene must decode sparsely"
    return scene, step.sparse


def check(
    index: ClusterIndex, keys: torch.Tensor, step: SparseStep, q: torch.Tensor, device: str, *, rotated: bool = True
) -> Workspace:
    """Score q [B, H, G, D] and compare all that it writes with the reference; the workspace."""
    index, step, keys, q = index_on(index, device), step_on(step, device), keys.to(device), q.to(device)
    guarded = Guarded(device)
    decoder = TritonDecoder(index, q.shape[2], guarded)
    decoder.prepare(step)
    decoder.score(q, keys, 0, SCALE)
    w, wide, dtype = decoder.workspace, q.float(), q.dtype
    expected = score(wide, keys, index, 0, step, SCALE)
    base = exact_logits(wide, keys, step.base_slots, step.base_count, SCALE)
    variance = segment_vectors(index, 0, step)[..., 2, :]
    bonus = 0.5 * SCALE**2 * torch.einsum("bhgd,bshd->bhgs", wide.square(), variance)
    for b in range(step.batch):
        own, listed = int(step.page_count[b]) * index.clusters_per_page, int(step.base_count[b])
        segments = int(step.segment_count[b])
        begin, end = w.offset[b : b + 2].tolist()
        assert_close(of_request(w, w.dot, b, own), expected.dot[b, :, :, :own], dtype)
        assert w.dot[..., begin + own : end].isnan().all(), "dots beyond the request's clusters"
        assert torch.equal(of_request(w, w.left, b, own), expected.size[b, :, :own].int())
        rows = index.cluster_rows(step.pages[b]).flatten()[:own]
        assert torch.equal(of_request(w, w.spread, b, own), index.layer(0).spread[rows].T)
        assert_close(w.base_logit[b, :, :, :listed], base[b, :, :, :listed], dtype)
        assert_close(w.segment_bonus[b, :, :, :segments], bonus[b, :, :, :segments], dtype)
        base_lse = w.base_lse[b, :, :, : math.ceil(listed / SCORE_TOKENS)]
        tiles = slice(begin // SCORE_CLUSTERS, math.ceil((begin + own) / SCORE_CLUSTERS))
        total = torch.cat((base_lse, w.estimate_lse[:, :, tiles]), -1).logsumexp(-1)
        assert_close(total, expected.total[b], dtype)
        choice = expected.dot + index.config.choice_spread * expected.bonus
        normaliser = torch.cat((expected.size.unsqueeze(2).float().log() + choice, base), -1).logsumexp(-1)
        assert_close(torch.cat((base_lse, w.choice_lse[:, :, tiles]), -1).logsumexp(-1), normaliser[b], dtype)
        assert w.choice_lse[:, :, tiles.stop : end // SCORE_CLUSTERS].isnan().all(), (
            "tiles beyond the request's clusters"
        )
    if rotated:
        assert_close(w.rotated[: step.batch], wide @ rotation_matrix(q.shape[-1]).T.to(device), dtype)
    guarded.assert_untouched()
    return w


def queries(batch: int, heads: int, group: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, heads, group, head_dim, generator=torch.Generator().manual_seed(group)).to(dtype)


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "kv_heads", "centroid_dtype"),
    [
        (64, 3, torch.float32, 2, "int4"),
        (64, 7, torch.bfloat16, 2, "int8"),
        (32, 1, torch.float16, 2, "bf16"),
        (32, 8, torch.float32, 1, "int8"),
        (96, 4, torch.bfloat16, 1, "int4"),
        (96, 1, torch.float32, 1, "int8"),
        (128, 4, torch.float32, 1, "int4"),
        (256, 3, torch.bfloat16, 1, "int4"),
    ],
)
def test_score_equals_the_reference(
    head_dim: int, group: int, dtype: torch.dtype, kv_heads: int, centroid_dtype: str, device: str
) -> None:
    config = replace(CONFIG, centroid_dtype=centroid_dtype)
    scene, step = scene_of(config, head_dim, dtype, kv_heads)
    assert len(set(step.page_count.tolist())) == 3, "the batch must be ragged"
    assert step.page_count.max() * 2 > SCORE_CLUSTERS and step.base_slots.shape[1] > SCORE_TOKENS, "one tile is too few"
    check(scene.index, scene.keys[0], step, queries(3, kv_heads, group, head_dim, dtype), device)


def test_equal_keys_leave_one_cluster_per_segment_and_the_rest_empty(device: str) -> None:
    scene = Scene(CONFIG, layers=1)
    scene.keys[0][:] = scene.keys[0][0]
    scene.prefill(1, 300)
    step = scene.decode([1], [301]).sparse
    assert step is not None
    w = check(scene.index, scene.keys[0], step, queries(1, 2, 2, 32, torch.float32), device)
    own = int(step.page_count[0]) * 2
    assert (of_request(w, w.left, 0, own) == 0).float().mean() > 0.8, "most clusters must be empty"


def test_nothing_is_rotated_where_nothing_is_refined(device: str) -> None:
    config = replace(CONFIG, refine=False)
    scene, step = scene_of(config, 32, torch.float32, 1)
    w = check(scene.index, scene.keys[0], step, queries(3, 1, 2, 32, torch.float32), device, rotated=False)
    assert w.rotated.isnan().all()
