"""Ours, with other summaries of what is not recalled: mean values in two bits, clusters of clusters.

By the kernels' references: this measures accuracy, not time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch

from sglang_clusterkv.clusters.codec import RowCodec, TokenCodec, channels_per_scale, rows_at
from sglang_clusterkv.clusters.index import ClusterIndex, LayerView
from sglang_clusterkv.clusters.step import SparseStep
from sglang_clusterkv.kernels.attend.reference import Partial, attend
from sglang_clusterkv.kernels.estimate.reference import estimate
from sglang_clusterkv.kernels.kmeans.reference import labels_of
from sglang_clusterkv.kernels.merge.reference import merge, note_mass
from sglang_clusterkv.kernels.refine.reference import refine
from sglang_clusterkv.kernels.score.reference import Scores, exact_logits, score, segment_vectors
from sglang_clusterkv.kernels.select.reference import select

CLUSTERS_PER_GROUP = 8
GROUP_PASSES = 3


class Source(NamedTuple):
    """One layer of one step, as the references take it."""

    clusters: ClusterIndex
    layer: int
    step: SparseStep
    scale: float

    @property
    def view(self) -> LayerView:
        return self.clusters.layer(self.layer)

    @property
    def rows(self) -> torch.Tensor:
        """Rows of the step's clusters in the layer's arrays, int64 [B, C]."""
        return self.clusters.cluster_rows(self.step.pages).flatten(1)

    @property
    def segment(self) -> torch.Tensor:
        """Ordinal of each cluster's segment in its request, int64 [B, C]."""
        return self.step.segment_of_page.repeat_interleave(self.clusters.clusters_per_page, 1)

    def values(self) -> torch.Tensor:
        """The clusters' mean values as stored, float32 [B, C, H, D]."""
        return self.clusters.row_codec.decode(*rows_at(self.view.value_rows, self.view.value_scales, self.rows))

    def vectors(self) -> torch.Tensor:
        """Mean key, mean value and variance of the segments, float32 [B, S, H, 3, D]."""
        return segment_vectors(self.clusters, self.layer, self.step)


class ChangedEstimate(ABC):
    """Our chain by its references, with refining; a subclass has its say on the scores and makes the estimate."""

    # What the last call recalled: slots, int64 [B, H, budget], and how many, int64 [B, H].
    recalled = (torch.empty(0), torch.empty(0))

    def rescored(self, scores: Scores, q: torch.Tensor, keys: torch.Tensor, source: Source) -> Scores:
        """What select, refine and the estimate see.

        Args:
            scores: of all clusters.
            q: float32 [B, H, G, D].
            keys: [slots, H, D], the layer's pool.
            source: the layer's clusters and the step's lists.
        """
        return scores

    @abstractmethod
    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """What was attended to exactly, and an estimate of what is left, int64 [B, H, C] tokens of each cluster."""

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: ClusterIndex,
        layer: int,
        step: SparseStep,
        scale: float,
    ) -> torch.Tensor:
        """See `kernels.decode.sparse_decode`; with refining and the estimate."""
        grouped = q.float().unflatten(1, (keys.shape[1], -1))
        source = Source(index, layer, step, scale)
        scores = self.rescored(score(grouped, keys, *source), grouped, keys, source)
        candidates = select(scores, index, layer, step, index.config.candidate_tokens)
        recalled = refine(grouped, scores, candidates, *source)
        exact = attend(grouped, keys, values, step, recalled.slots, recalled.count, scale)
        self.recalled = recalled.slots, recalled.count
        whole = self.whole(exact, scores, recalled.left, source)
        note_mass(index.mass[layer], exact.lse, whole.lse)
        return whole.output.flatten(1, 2).to(q.dtype)


class OtherValues:
    """An index whose mean values are these: bf16 rows, uint8 [clusters of the pool, H, 2 D]."""

    def __init__(self, index: ClusterIndex, value_rows: torch.Tensor) -> None:
        self.config = index.config
        self.clusters_per_page = index.clusters_per_page
        self.row_codec = RowCodec("bf16", index.geometry.head_dim)
        self.cluster_rows = index.cluster_rows
        self._index, self._value_rows = index, value_rows

    def layer(self, layer: int) -> LayerView:
        """The layer's arrays, with the other values."""
        return self._index.layer(layer)._replace(value_rows=self._value_rows, value_scales=None)


class TwoBitValues(ChangedEstimate):
    """Mean values in two bits, relative to their segment's, a scale for as many channels as a stored row has one for."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: rows as stored, and in two bits

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """As ours, from other values."""
        stored = source.view.value_rows[source.rows]
        known, rows = self._kept.get(source.layer, (stored[:0], stored))
        if not torch.equal(known, stored):
            rows = self._rows(source)
            self._kept[source.layer] = stored, rows
        other = cast("ClusterIndex", OtherValues(source.clusters, rows))
        return merge(exact, estimate(scores, left, other, source.layer, source.step))

    @staticmethod
    def _rows(source: Source) -> torch.Tensor:
        """Of the step's clusters; all others' are garbage."""
        values = source.values()
        at = source.segment[:, :, None, None].expand_as(values)
        center = source.vectors()[..., 1, :].gather(1, at)
        found = center + in_two_bits(values - center)
        packed, _ = RowCodec("bf16", found.shape[-1]).encode(found)
        rows = packed.new_zeros((source.view.value_rows.shape[0], *packed.shape[2:]))
        rows[source.rows] = packed
        return rows


def in_two_bits(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] as two bits per channel and a scale per group of channels tell it."""
    per_scale = channels_per_scale(x.shape[-1])
    codec = TokenCodec(2, per_scale)
    return codec.decode(*codec.encode(x.unflatten(-1, (-1, per_scale)))).flatten(-2)


def two_bit_bytes(head_dim: int) -> float:
    """Of one such row."""
    return head_dim / 4 + 2 * head_dim / channels_per_scale(head_dim)


class Groups(NamedTuple):
    """Groups of a request's clusters, N of them, each within a segment; empty ones have size 0."""

    of_cluster: torch.Tensor  # int64 [H, C]
    size: torch.Tensor  # float32 [H, N], tokens
    center: torch.Tensor  # float32 [H, N, D], mean key
    spread: torch.Tensor  # float32 [H, N], as that of clusters
    value: torch.Tensor  # float32 [H, N, D], mean value
    segment: torch.Tensor  # int64 [N]


class TwoLevels(ChangedEstimate):
    """Groups of clusters are scored first; only the clusters of the best groups are, the others are estimated by group.

    Args:
        opened: tokens of the opened groups, in times of `candidate_tokens`.
    """

    def __init__(self, opened: float) -> None:
        assert opened >= 1, "candidates come from opened groups"
        self._opened = opened
        self._kept: dict[
            tuple[int, int], tuple[torch.Tensor, Groups]
        ] = {}  # by layer and request, with the rows as stored
        self._is_open = torch.empty(0)  # bool [B, H, C], of the last layer
        self._closed = Partial(torch.empty(0), torch.empty(0))  # the estimate of its closed groups

    def rescored(self, scores: Scores, q: torch.Tensor, keys: torch.Tensor, source: Source) -> Scores:
        """Clusters of groups that are not opened look as their group does, and can't be candidates."""
        config, scale = source.clusters.config, source.scale
        assert config.estimate_spread > 0, "the clusters' spread is found by way of the estimate's bonus"
        base = exact_logits(q, keys, source.step.base_slots, source.step.base_count, scale).logsumexp(-1)
        dot, bonus = scores.dot.clone(), scores.estimate_bonus / config.estimate_spread
        is_open = torch.zeros(scores.size.shape, dtype=torch.bool, device=q.device)
        closed = []
        for b in range(q.shape[0]):
            groups = self._groups(scores, source, b)
            q_variance = torch.einsum("hgd,shd->hgs", q[b].square(), source.vectors()[b, :, :, 2])
            group_dot = scale * torch.einsum("hgd,hnd->hgn", q[b], groups.center)
            group_bonus = 0.5 * scale**2 * groups.spread.unsqueeze(1) * q_variance[..., groups.segment]
            choice, log_size = group_dot + config.choice_spread * group_bonus, groups.size.log().unsqueeze(1)
            normaliser = torch.logaddexp((log_size + choice).logsumexp(-1), base[b])
            mass = (choice - normaliser.unsqueeze(-1)).exp().mean(1).masked_fill(groups.size == 0, -1.0)
            order = mass.argsort(dim=-1, descending=True, stable=True)
            sizes = groups.size.gather(-1, order)
            before = sizes.cumsum(-1) - sizes
            opens = torch.zeros_like(mass, dtype=torch.bool)
            opens.scatter_(-1, order, before < self._opened * config.candidate_tokens)
            is_open[b] = opens.gather(-1, groups.of_cluster)
            at = groups.of_cluster.unsqueeze(1).expand_as(dot[b])
            dot[b] = torch.where(is_open[b].unsqueeze(1), dot[b], group_dot.gather(-1, at))
            bonus[b] = torch.where(is_open[b].unsqueeze(1), bonus[b], group_bonus.gather(-1, at))
            logits = (log_size + group_dot + config.estimate_spread * group_bonus).masked_fill(
                opens.unsqueeze(1), -torch.inf
            )
            lse = logits.logsumexp(-1)
            weights = (logits - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp()
            closed.append(Partial(torch.einsum("hgn,hnd->hgd", weights, groups.value), lse))
        self._is_open = is_open
        self._closed = Partial(*(torch.stack(parts) for parts in zip(*closed, strict=True)))
        log_size = scores.size.float().log().unsqueeze(2)
        choice, sober = dot + config.choice_spread * bonus, dot + config.estimate_spread * bonus
        normaliser = torch.logaddexp((log_size + choice).logsumexp(-1), base)
        mass = (choice - normaliser.unsqueeze(-1)).exp().mean(2)
        return scores._replace(
            dot=dot,
            estimate_bonus=config.estimate_spread * bonus,
            mass=mass.masked_fill((scores.size == 0) | ~is_open, 0.0),
            total=torch.logaddexp((log_size + sober).logsumexp(-1), base),
        )

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """Opened groups by their clusters, closed ones by themselves."""
        return merge(merge(exact, estimate(scores, left * self._is_open, *source[:3])), self._closed)

    def _groups(self, scores: Scores, source: Source, b: int) -> Groups:
        """Of one request, made anew where its clusters changed."""
        stored = source.view.key_rows[source.rows[b]]
        known, groups = self._kept.get((source.layer, b), (stored[:0], None))
        if groups is None or not torch.equal(known, stored):
            groups = _make_groups(scores.size[b].float(), source, b)
            self._kept[source.layer, b] = stored, groups
        return groups


def _make_groups(size: torch.Tensor, source: Source, b: int) -> Groups:
    """k-means over each segment's centroids, `CLUSTERS_PER_GROUP` of them per group; size: float32 [H, C]."""
    view, rows, vectors = source.view, source.rows[b], source.vectors()[b]
    centroids = source.clusters.row_codec.decode(*rows_at(view.key_rows, view.key_scales, rows)).transpose(0, 1)
    values = source.values()[b].transpose(0, 1)  # [H, C, D]
    spread = view.spread[rows].float().T
    count = int(source.step.page_count[b]) * source.clusters.clusters_per_page
    borders = [int(begin) * source.clusters.clusters_per_page for begin in source.step.segment_begin[b]]
    borders = [*borders[: int(source.step.segment_count[b])], count]
    of_cluster = torch.zeros(size.shape, dtype=torch.int64, device=size.device)
    parts, made = [], 0
    for s, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)):
        groups = -(-(end - begin) // CLUSTERS_PER_GROUP)
        own = labels_of(centroids[:, begin:end].contiguous(), groups, GROUP_PASSES)
        weight = torch.nn.functional.one_hot(own, groups).float() * size[:, begin:end].unsqueeze(-1)  # [H, c, n]
        tokens = weight.sum(1)
        share = (weight / tokens.clamp(min=1.0).unsqueeze(1)).transpose(1, 2)  # [H, n, c]
        center = share @ centroids[:, begin:end]
        apart = (
            centroids[:, begin:end] - center.gather(1, own.unsqueeze(-1).expand(-1, -1, center.shape[-1]))
        ).square()
        variance = vectors[s, :, 2].sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        wide = spread[:, begin:end] + apart.sum(-1) / variance
        parts.append(
            (
                tokens,
                center + vectors[s, :, 0].unsqueeze(1),
                (share @ wide.unsqueeze(-1)).squeeze(-1),
                share @ values[:, begin:end],
                torch.full((groups,), s, device=size.device),
            )
        )
        of_cluster[:, begin:end] = own + made
        made += groups
    sizes, centers, spreads, means, segments = zip(*parts, strict=True)
    return Groups(
        of_cluster,
        torch.cat(sizes, 1),
        torch.cat(centers, 1),
        torch.cat(spreads, 1),
        torch.cat(means, 1),
        torch.cat(segments),
    )
