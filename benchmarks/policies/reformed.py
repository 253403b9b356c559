"""Ours in another format: tables made from a request's keys and values as they lie in the pool, and a step over them.

By torch on whole arrays: this measures accuracy, not time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks.policies.anchors import by_label, means_of
from benchmarks.policies.estimates import Source, all_tokens
from benchmarks.policies.formats import Format
from benchmarks.policies.policy import clustered_slots
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.kmeans.reference import labels_of, outlier_count
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.memory.codec import INNER_LEVEL, LEVEL_BORDER, OUTER_LEVEL, channels_per_scale
from sglang_clusterkv.memory.rotation import rotation_matrix

SIGN_LEVEL = math.sqrt(2 / math.pi)  # mean size of a normal variable
STEPS_PER_OCTAVE = 16  # of a scale in eight bits
# Levels of three bits, in units of the root mean square, and what lies between them (Max, 1960).
THREE_BITS = (0.2451, 0.7560, 1.344, 2.152)
THREE_BIT_BORDERS = (0.5006, 1.050, 1.748)
LEAST_SHARE, MOST_SHARE = 0.25, 3.0  # of the budget, that a head which shares gets


class Tables(NamedTuple):
    """One request in one layer: T clustered tokens in sequence order, C clusters, S segments."""

    slots: torch.Tensor  # int64 [T]
    keys: torch.Tensor  # float32 [H, T, D], exact
    values: torch.Tensor  # likewise
    of_cluster: torch.Tensor  # int64 [H, T]
    rank: torch.Tensor  # int64 [H, T], of a token in its cluster
    size: torch.Tensor  # float32 [H, C]
    segment: torch.Tensor  # int64 [C]
    centroid: torch.Tensor  # float32 [H, C, D]
    spread: torch.Tensor  # float32 [H, C]
    variance: torch.Tensor  # float32 [H, S, D]
    first: torch.Tensor  # float32 [H, T, D], rotated residuals as the first look at a code tells them
    second: torch.Tensor  # float32 [H, T, D], as the second does; the same where there is one look
    value: torch.Tensor  # float32 [H, C, D]
    segment_value: torch.Tensor  # float32 [H, S, D]
    movement: torch.Tensor  # float32 [H, S, D of values, D of keys]


def in_steps(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [..., D] in even steps, with a scale for each group of channels, as stored rows have."""
    limit = 2.0 ** (bits - 1) - 1
    groups = x.unflatten(-1, (-1, channels_per_scale(x.shape[-1])))
    scale = (groups.abs().amax(-1, keepdim=True) / limit).bfloat16().float()
    levels = torch.where(scale > 0, groups / torch.where(scale > 0, scale, 1.0), 0.0)
    return (levels.round().clamp(-limit - 1, limit) * scale).flatten(-2)


def in_three_bits(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., D], rotated, by the levels of a normal variable and one scale."""
    rotation = rotation_matrix(x.shape[-1], str(x.device))
    y = x @ rotation.T
    rms = y.square().mean(-1, keepdim=True).sqrt()
    at = torch.bucketize(y.abs() / rms.clamp(min=torch.finfo(torch.float32).tiny), y.new_tensor(THREE_BIT_BORDERS))
    level = y.new_tensor(THREE_BITS)[at]
    scale = ((y.abs() * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)).bfloat16().float()
    return torch.where(y < 0, -level, level) * scale @ rotation


def in_eight_bits(scale: torch.Tensor) -> torch.Tensor:
    """Scales, at least 0, of which the logarithm is stored."""
    exponent = (scale.clamp(min=1e-30).log2() * STEPS_PER_OCTAVE).round() / STEPS_PER_OCTAVE
    return torch.where(scale > 0, exponent.exp2(), 0.0)


def looks(y: torch.Tensor, labels: torch.Tensor, clusters: int, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated residuals as the first and the second look at their codes tell them.

    Args:
        y: float32 [H, T, D].
        labels: int64 [H, T].
        clusters: C.
        form: of the codes.

    Returns:
        Two float32 [H, T, D].
    """
    size, by_cluster = y.abs(), form.scale == "cluster"

    def of_token(x: torch.Tensor) -> torch.Tensor:
        """float32 [H, T, D] -> its sum [H, T, 1] over the channels, or over the tokens of its cluster too."""
        sums = x.sum(-1, keepdim=True)
        return by_label(sums, labels, clusters).gather(1, labels.unsqueeze(-1)) if by_cluster else sums

    count = of_token(torch.ones_like(y))
    if form.code_bits == 1:
        level = torch.ones_like(y)
    else:
        border = LEVEL_BORDER * (of_token(y.square()) / count).sqrt()
        level = torch.where(size >= border, OUTER_LEVEL, INNER_LEVEL)
    scale = of_token(size * level) / of_token(level.square())
    scale = in_eight_bits(scale) if form.scale == "token8" else scale.bfloat16().float()
    sign = torch.where(y < 0, -1.0, 1.0)
    second = sign * level * scale
    return (sign * scale * SIGN_LEVEL if form.second_look else second), second


def tables(source: Source, b: int, form: Format) -> Tables:
    """Of request b, from the pool and the clusters as they are stored, or from clusters of another size."""
    step, config = source.step, source.clusters.config
    page_size, clusters_per_page = source.clusters.geometry.page_size, source.clusters.clusters_per_page
    pages, segments = int(step.page_count[b]), int(step.segment_count[b])
    slots = clustered_slots(step, b, page_size)
    keys, values = (pool[slots].transpose(0, 1).float() for pool in (source.keys, source.values))
    of_token = step.segment_of_page[b, :pages].repeat_interleave(page_size)
    if form.tokens_per_cluster is None:
        scores = score(source.q, source.keys, source.clusters, source.layer, step, source.scale)
        labels = all_tokens(scores, source).cluster[b, :, : len(slots)]
        segment = step.segment_of_page[b, :pages].repeat_interleave(clusters_per_page)
    else:
        labels, segment = clustered_anew(keys, of_token, segments, form.tokens_per_cluster, config)
    return make(slots, keys, values, of_token, labels, segment, form)


def make(
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    of_token: torch.Tensor,
    labels: torch.Tensor,
    segment: torch.Tensor,
    form: Format,
) -> Tables:
    """Of clusters that are given.

    Args:
        slots: int64 [T].
        keys: float32 [H, T, D].
        values: likewise.
        of_token: int64 [T], each token's segment.
        labels: int64 [H, T], its cluster.
        segment: int64 [C], of each cluster.
        form: the format.
    """
    clusters, segments = len(segment), int(of_token[-1]) + 1
    means = means_of(keys, labels, clusters)

    def at(rows: torch.Tensor) -> torch.Tensor:
        """Each token's cluster's row: [H, C, D] -> [H, T, D]."""
        return rows.gather(1, labels.unsqueeze(-1).expand_as(keys))

    apart = keys - at(means)
    of_segment = of_token.expand_as(labels)
    vectors = torch.stack([means_of(rows, of_segment, segments) for rows in (keys, values, apart.square())], 2)
    total = vectors[:, :, 2].sum(-1)[:, segment]
    if form.vector_bits < 16:
        scale = (vectors.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        vectors = (vectors / scale).round() * scale
    mean_key, mean_value, variance = vectors.bfloat16().float().unbind(2)
    center = mean_key[:, segment]
    relative = means - center
    centroid = center + (in_three_bits(relative) if form.turned else in_steps(relative, form.centroid_bits))
    width = means_of(apart.square().sum(-1, keepdim=True), labels, clusters).squeeze(-1)
    spread = torch.where(total > 0, width / total.clamp(min=1e-30), 0.0).bfloat16().float()
    residual = (keys - at(centroid)) @ rotation_matrix(keys.shape[-1], str(keys.device)).T
    size = by_label(torch.ones_like(keys[..., :1]), labels, clusters).squeeze(-1)
    value = means_of(values, labels, clusters)
    movement = keys.new_zeros(0)
    if form.rank:
        movement = moved_with(apart, values - at(value), spread.gather(1, labels), of_token, segments, form.rank)
    if form.clusters_per_value > 1:
        value = shared_by_neighbours(relative, value, size, segment, form.clusters_per_value)
    order = labels.argsort(dim=-1, stable=True)
    begin = size.long().cumsum(-1) - size.long()
    places = torch.empty_like(labels).scatter_(1, order, torch.arange(len(slots)).expand_as(labels))
    return Tables(
        slots,
        keys,
        values,
        labels,
        places - begin.gather(1, labels),
        size,
        segment,
        centroid,
        spread,
        variance,
        *looks(residual, labels, clusters, form),
        in_steps(value, 4),
        mean_value,
        movement,
    )


def clustered_anew(
    keys: torch.Tensor, of_token: torch.Tensor, segments: int, tokens_per_cluster: int, config: ClusterKVConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, int64 [H, T], and the segment of each cluster, int64 [C]: as segments are clustered, by another size."""
    labels, segment, made = [], [], 0
    for s in range(segments):
        own = keys[:, of_token == s]
        count = own.shape[1] // tokens_per_cluster
        centered = own - own.mean(1, keepdim=True)
        labels.append(
            labels_of(centered, count, config.kmeans_passes, outlier_count(count, config.outlier_share)) + made
        )
        segment.append(torch.full((count,), s))
        made += count
    return torch.cat(labels, 1), torch.cat(segment)


def shared_by_neighbours(
    relative: torch.Tensor, value: torch.Tensor, size: torch.Tensor, segment: torch.Tensor, together: int
) -> torch.Tensor:
    """Mean values, float32 [H, C, D], of which clusters with near centroids have their mean."""
    found = torch.empty_like(value)
    for s in range(int(segment[-1]) + 1):
        own = segment == s
        groups = max(1, int(own.sum()) // together)
        labels = labels_of(relative[:, own].contiguous(), groups, 3)
        weight = size[:, own].unsqueeze(-1)
        sums = by_label(torch.cat((value[:, own] * weight, weight), -1), labels, groups)
        means = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        found[:, own] = means.gather(1, labels.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
    return found


def moved_with(
    keys: torch.Tensor,
    values: torch.Tensor,
    spread: torch.Tensor,
    of_token: torch.Tensor,
    segments: int,
    rank: int,
) -> torch.Tensor:
    """Covariance of values and keys inside clusters of spread 1, of that rank, its factors in four bits: [H, S, D, D].

    Args:
        keys: float32 [H, T, D], from their cluster's mean.
        values: likewise.
        spread: float32 [H, T], of each token's cluster.
        of_token: int64 [T], its segment.
        segments: S.
        rank: of the covariance.
    """
    found = []
    for s in range(segments):
        own = of_token == s
        total = values[:, own].transpose(1, 2) @ keys[:, own]
        u, sizes, v = torch.linalg.svd(total / spread[:, own].sum(-1).clamp(min=1e-6)[:, None, None])
        root = sizes[:, None, :rank].sqrt()
        left, right = (
            in_steps((side * root).transpose(1, 2), 4) for side in (u[..., :rank], v.transpose(1, 2)[..., :rank])
        )
        found.append(left.transpose(1, 2) @ right)
    return torch.stack(found, 1)
