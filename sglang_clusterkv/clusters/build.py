"""Build a segment: cluster the keys of its pages, for every kv head of the layers that recall, and write the rows of its pages.

Runs on the device at the head of a forward, eagerly. The same keys give the same tables in every batch: a segment is
built alone, so that no matrix shape depends on what else is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_clusterkv.kernels import encode, kmeans, movement
from sglang_clusterkv.kernels.tier import gather
from sglang_clusterkv.memory import movement as moved_values
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.tier import BUILD_HOST, Tier, TierLayer

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.kmeans.triton.segments import Clustering

SCRATCH_BYTES = 128 << 20  # of one call for several segments on a GPU; a segment alone may take more


class SegmentTables(NamedTuple):
    """What is stored of one segment, before it is written. N = heads (of several layers), M = tokens, C = clusters."""

    labels: torch.Tensor  # int64 [N, M]
    members: torch.Tensor  # int64 [N, M], offsets sorted by cluster, ascending inside
    cluster_end: torch.Tensor  # int64 [N, C]
    mean_key: torch.Tensor  # bf16 [N, D]
    mean_value: torch.Tensor  # bf16 [N, D]
    variance: torch.Tensor  # bf16 [N, D], mean within-cluster variance by channel
    key_rows: torch.Tensor  # uint8 [N, C, packed_bytes]
    key_scales: torch.Tensor | None  # bf16 [N, C, scales]
    value_rows: torch.Tensor  # uint8 [N, C, packed_bytes]
    value_scales: torch.Tensor | None  # bf16 [N, C, scales]
    spread: torch.Tensor  # bf16 [N, C]
    codes: torch.Tensor | None  # uint8 [N, M, code_bytes], in the order of `members`
    code_scales: torch.Tensor | None  # bf16 [N, M]
    movement: torch.Tensor | None  # bf16 [N, R, 3, D/4], as `memory.movement` packs it; None where R is 0


def cluster_segment(index: ClusterIndex, keys: torch.Tensor, values: torch.Tensor) -> SegmentTables:
    """Cluster one segment's keys and describe the clusters (docs/design.md "Exactly": k-means, spread, rows, codes).

    Args:
        index: gives configuration and codecs.
        keys: float32 [N, M, D].
        values: float32 [N, M, D].
    """
    config = index.config
    tokens = keys.shape[1]
    clusters = tokens // config.tokens_per_cluster
    outliers = kmeans.outlier_count(clusters, config.outlier_share)
    center = keys.mean(1)
    centered = keys - center.unsqueeze(1)
    labels = kmeans.labels_of(centered, clusters, config.kmeans_passes, outliers)

    members = labels.argsort(dim=1, stable=True)
    sizes = torch.zeros((keys.shape[0], clusters), dtype=torch.int64, device=keys.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    count = sizes.clamp(min=1).unsqueeze(-1)
    centroids = kmeans.sum_by_label(centered, labels, clusters) / count
    mean_values = kmeans.sum_by_label(values, labels, clusters) / count

    variance = encode.within_variance(centered, centroids, labels)
    total = variance.by_channel.sum(-1, keepdim=True)
    spread = torch.where(total > 0, variance.by_cluster / torch.where(total > 0, total, 1.0), 0.0)

    mean_key = center.to(torch.bfloat16)
    # Rows are relative to the mean as stored, so that a step adds one q.mean per segment and nothing is lost.
    key_rows, key_scales = encode.rows(index.row_codec, centroids + (center - mean_key.float()).unsqueeze(1))
    value_rows, value_scales = encode.rows(index.row_codec, mean_values)
    codes = code_scales = None
    if "codes" in index.arrays:  # whether or not a step refines just now
        stored = index.row_codec.decode(key_rows, key_scales) + mean_key.float().unsqueeze(1)
        codes, code_scales = encode.token_codes(keys, stored, labels, members, index.token_codec)
    moved = None
    if index.keeps_movement and (rank := moved_values.rank_of(tokens // index.geometry.page_size)):
        moved = _packed(movement.factors(centered, centroids, values, mean_values, labels, rank))
    return SegmentTables(
        labels=labels,
        members=members,
        cluster_end=sizes.cumsum(1),
        mean_key=mean_key,
        mean_value=values.mean(1).to(torch.bfloat16),
        variance=variance.by_channel.to(torch.bfloat16),
        key_rows=key_rows,
        key_scales=key_scales,
        value_rows=value_rows,
        value_scales=value_scales,
        spread=spread.to(torch.bfloat16),
        codes=codes,
        code_scales=code_scales,
        movement=moved,
    )


def build_segments(
    index: ClusterIndex,
    segment_ids: list[int],
    segments: list[torch.Tensor],
    key_buffers: list[torch.Tensor],
    value_buffers: list[torch.Tensor],
    tier: Tier | None = None,
) -> None:
    """Cluster the tokens of some segments in every layer that has clusters, write the tables, and mark the pages.

    Args:
        index: the index to write.
        segment_ids: unique, from the plan.
        segments: int64 [M] each, the slots of whole pages in sequence order.
        key_buffers: the pool's keys, one [slots, H, D] per layer.
        value_buffers: likewise.
        tier: where the keys and values of some slots are on the host.
    """
    if segments[0].device.type == "cuda":
        write_in_place(index, segments, key_buffers, value_buffers, tier)
    else:
        for slots in segments:
            _build(index, slots, key_buffers, value_buffers, tier)
    page_size = index.geometry.page_size
    index.mark(segment_ids, [slots[::page_size] // page_size for slots in segments])


def _build(
    index: ClusterIndex,
    slots: torch.Tensor,
    key_buffers: list[torch.Tensor],
    value_buffers: list[torch.Tensor],
    tier: Tier | None,
) -> None:
    """One segment in torch, a layer at a time: that stays in a CPU's cache, and no shape depends on the batch."""
    pages = slots[:: index.geometry.page_size] // index.geometry.page_size
    for row, layer in enumerate(index.geometry.clustered_layers):
        hosts = [None if tier is None else tier.layer(layer)]
        keys = _heads_first([key_buffers[layer]], slots, hosts, 0)
        values = _heads_first([value_buffers[layer]], slots, hosts, 1)
        _write(index, slice(row, row + 1), pages, slots, cluster_segment(index, keys, values))


def tokens_per_call(index: ClusterIndex, copied: bool) -> int:
    """Tokens of a call of `write_in_place`, of segments of one length, so that its scratch is about `SCRATCH_BYTES` at most.

    Args:
        index: gives sizes and configuration.
        copied: keys and values are copied first, as from a host tier.
    """
    geometry = index.geometry
    of_cluster = 5 * geometry.head_dim + 16  # centroids as two bf16, parts of sums; norms, ends, variances, outliers
    of_token = 8 + of_cluster / index.config.tokens_per_cluster  # label, member, distance
    if copied:
        of_token += 8 * geometry.head_dim  # as float32
    return int(SCRATCH_BYTES / (of_token * geometry.kv_heads * len(geometry.clustered_layers)))


def write_in_place(
    index: ClusterIndex,
    segments: list[torch.Tensor],
    key_buffers: list[torch.Tensor],
    value_buffers: list[torch.Tensor],
    tier: Tier | None = None,
) -> None:
    """Cluster segments by Triton's kernels, all heads and layers with clusters in each launch, and write their tables.

    Reads the pool where it lies. Scratch: a quarter of the segments' keys in bf16, at 8 tokens per cluster. With a tier their
    keys and values are copied first, from wherever they are, for they are read some ten times: twice their bytes more. What
    values move by is made in torch from the labels, see `_write_movement`.

    Args:
        index: the index to write; its pages are not marked.
        segments: int64 [M] each, the slots of whole pages in sequence order; of different lengths.
        key_buffers: as in `build_segments`; all of one stride.
        value_buffers: likewise.
        tier: where the keys and values of some slots are on the host.
    """
    from sglang_clusterkv.kernels.encode import triton as encoding
    from sglang_clusterkv.kernels.encode.triton.target import target_of
    from sglang_clusterkv.kernels.kmeans import triton as clustering
    from sglang_clusterkv.kernels.kmeans.triton.segments import pool_of, segments_of, stacked

    config, layers = index.config, index.geometry.clustered_layers
    key_buffers, value_buffers = ([buffers[layer] for layer in layers] for buffers in (key_buffers, value_buffers))
    batch = segments_of(segments, config.tokens_per_cluster, config.outlier_share, copied=tier is not None)
    if tier is None:
        pools = ("pools", *(buffer.data_ptr() for buffer in (*key_buffers, *value_buffers)))
        if pools not in index.scratch:
            index.scratch[pools] = pool_of(key_buffers), pool_of(value_buffers)
        keys, values = index.scratch[pools]
    else:
        sizes = (2, len(key_buffers), len(batch.slots), *key_buffers[0].shape[1:])
        copies = torch.empty(sizes, dtype=key_buffers[0].dtype, device=batch.slots.device)
        for part, first in _runs(layers):
            gather(tier, first, batch.slots, copies[0, part], copies[1, part], BUILD_HOST)
        keys, values = map(stacked, copies)
    found = clustering.cluster(keys, batch, config.kmeans_passes)
    if index.keeps_movement:
        read_slots = batch.read_slots.split([len(slots) for slots in segments])
        if tier is None:
            _write_movement(index, segments, read_slots, key_buffers, value_buffers, found)
        else:
            _write_movement(index, segments, read_slots, list(copies[0]), list(copies[1]), found)
    encoding.write(
        keys,
        values,
        batch,
        found,
        target_of(index.arrays, index.row_codec, index.token_codec),
        page_size=index.geometry.page_size,
        clusters_per_page=index.clusters_per_page,
        rows=index.row_codec,
        tokens=index.token_codec,
    )


def _write_movement(
    index: ClusterIndex,
    segments: list[torch.Tensor],
    read_slots: tuple[torch.Tensor, ...],
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    found: Clustering,
) -> None:
    """Movement of segments from their labels, in torch: a segment alone, so that no sum of one depends on another.

    Args:
        index: the index to write.
        segments: as `write_in_place` takes them.
        read_slots: where each one's keys and values lie in the buffers.
        keys: [slots, H, D] of each layer with clusters.
        values: likewise.
        found: its labels, of all segments.
    """
    heads, per_cluster = index.geometry.kv_heads, index.config.tokens_per_cluster
    labels = found.labels.split([len(slots) for slots in segments], 1)
    for slots, source, own in zip(segments, read_slots, labels, strict=True):
        pages = slots[:: index.geometry.page_size] // index.geometry.page_size
        rank = moved_values.rank_of(len(pages))
        if not rank:
            continue
        covariances = []
        for row in range(len(keys)):
            of_layer = own[row * heads : (row + 1) * heads].long()
            rows, moved = (_heads_first([buffers[row]], source, [None], 0) for buffers in (keys, values))
            covariances.append(movement.covariance(rows, moved, of_layer, len(slots) // per_cluster))
        tables = _packed(movement.factors_of(torch.cat(covariances), rank))
        tables = tables.unflatten(0, (len(keys), -1)).transpose(1, 2)
        behind = pages[SEGMENT_VECTOR_PAGES : SEGMENT_VECTOR_PAGES + rank]
        index.arrays["segment_vectors"].index_copy_(1, behind, tables)


def _packed(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Factors [N, R, D] each as pages hold them, bf16 [N, R, 3, D/4]."""
    rows, scales = encode.rows(moved_values.row_codec(factors[0].shape[2]), torch.stack(factors, -2))
    assert scales is not None
    return moved_values.pack(rows, scales)


def _heads_first(
    buffers: list[torch.Tensor], slots: torch.Tensor, hosts: list[TierLayer | None], part: int
) -> torch.Tensor:
    """Rows `slots` of each [S, H, D] buffer (keys: part 0, values: part 1), as float32 [layers * H, M, D]."""
    found = []
    for buffer, host in zip(buffers, hosts, strict=True):
        if host is None:
            found.append(buffer.index_select(0, slots))
        else:
            found.append(host.gather(buffer, part, slots))
            if part:  # a row is a key and its value
                host.count(BUILD_HOST, slots)
    rows = torch.stack(found)
    return rows.float().transpose(1, 2).flatten(0, 1).contiguous()


def _runs(layers: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    """Runs of consecutive layers: their places in the list, and the first of them."""
    begin = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end] != layers[end - 1] + 1:
            yield slice(begin, end), layers[begin]
            begin = end


def _write(index: ClusterIndex, span: slice, pages: torch.Tensor, slots: torch.Tensor, tables: SegmentTables) -> None:
    """Write one segment's tables at the rows of its pages and slots, for consecutive layers of the index."""
    arrays = index.arrays
    rows = index.cluster_rows(pages).flatten()

    def by_layer(table: torch.Tensor) -> torch.Tensor:
        """[layers * H, X, ...] -> [layers, X, H, ...]."""
        return table.unflatten(0, (span.stop - span.start, -1)).transpose(1, 2)

    for name, where, table in (
        ("key_rows", rows, tables.key_rows),
        ("key_scales", rows, tables.key_scales),
        ("value_rows", rows, tables.value_rows),
        ("value_scales", rows, tables.value_scales),
        ("spread", rows, tables.spread),
        ("cluster_end", rows, tables.cluster_end.to(torch.int16)),
        ("members", slots, tables.members.to(torch.int16)),
        ("codes", slots, tables.codes),
        ("code_scales", slots, tables.code_scales),
    ):
        if table is not None:
            arrays[name][span].index_copy_(1, where, by_layer(table))

    vectors = torch.stack((tables.mean_key, tables.mean_value, tables.variance), 1)  # [N, 3, D]
    quarters = arrays["segment_vectors"].shape[-1]
    vectors = vectors.unflatten(-1, (-1, quarters)).permute(0, 2, 1, 3)  # [N, 4, 3, D/4]
    arrays["segment_vectors"][span].index_copy_(1, pages[:SEGMENT_VECTOR_PAGES], by_layer(vectors))
    if tables.movement is not None:
        behind = pages[SEGMENT_VECTOR_PAGES : SEGMENT_VECTOR_PAGES + tables.movement.shape[1]]
        arrays["segment_vectors"][span].index_copy_(1, behind, by_layer(tables.movement))
