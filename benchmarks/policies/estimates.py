"""Ours, with other summaries of what is not recalled: mean values in two bits, clusters of clusters, values that move; and
with other caps of the spread.

By the kernels' references: this measures accuracy, not time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch

from sglang_clusterkv.kernels.attend.reference import attend
from sglang_clusterkv.kernels.estimate.reference import estimate, token_logits
from sglang_clusterkv.kernels.kmeans.reference import labels_of
from sglang_clusterkv.kernels.merge.reference import Partial, merge, note_mass
from sglang_clusterkv.kernels.refine.reference import refine
from sglang_clusterkv.kernels.score.reference import Scores, exact_logits, score, segment_vectors
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec, channels_per_scale, rows_at
from sglang_clusterkv.memory.index import ClusterIndex, LayerView
from sglang_clusterkv.memory.masses import SPREAD_CAP
from sglang_clusterkv.memory.step import SparseStep

CLUSTERS_PER_GROUP = 8
GROUP_PASSES = 3


class Source(NamedTuple):
    """One layer of one step, as the references take it."""

    clusters: ClusterIndex
    layer: int
    step: SparseStep
    scale: float
    q: torch.Tensor  # float32 [B, H, G, D]
    keys: torch.Tensor  # the layer's pool, [slots, H, D]
    values: torch.Tensor
    code: torch.Tensor | None = None  # as `Recalled` has it, once tokens were recalled

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

    def mean_values(self) -> torch.Tensor:
        """The clusters' mean values as stored, float32 [B, C, H, D]."""
        return self.clusters.row_codec.decode(*rows_at(self.view.value_rows, self.view.value_scales, self.rows))

    def vectors(self) -> torch.Tensor:
        """Mean key, mean value and variance of the segments, float32 [B, S, H, 3, D]."""
        return segment_vectors(self.clusters, self.layer, self.step)


def our_estimate(scores: Scores, left: torch.Tensor, source: Source) -> Partial:
    """As ours: see `kernels.estimate.reference.estimate`."""
    return estimate(scores, left, source.clusters, source.layer, source.step, source.q, source.scale, source.code)


class ChangedEstimate(ABC):
    """Our chain by its references, with refining; a subclass has its say on the scores and makes the estimate."""

    # What the last call recalled: slots, int64 [B, H, budget], and how many, int64 [B, H].
    recalled = (torch.empty(0), torch.empty(0))

    def rescored(self, scores: Scores, source: Source) -> Scores:
        """What select, refine and the estimate see, from the scores of all clusters."""
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
        source = Source(index, layer, step, scale, grouped, keys, values)
        scores = self.rescored(score(grouped, keys, index, layer, step, scale), source)
        candidates = select(scores, index, layer, step, index.config.candidate_tokens)
        recalled = refine(grouped, scores, candidates, index, layer, step, scale)
        exact = attend(grouped, keys, values, step, recalled.slots, recalled.count, scale)
        self.recalled = recalled.slots, recalled.count
        whole = self.whole(exact, scores, recalled.left, source._replace(code=recalled.code))
        note_mass(index.mass_cells[layer, 0], exact.lse, whole.lse)
        return whole.output.flatten(1, 2).to(q.dtype)


class OtherCap(ChangedEstimate):
    """Another cap of the clusters' bonus than the one that is served.

    Args:
        estimate: of the bonus in the estimate; inf: none.
        choice: of the bonus in the choice; None: none, as it is served.
    """

    def __init__(self, estimate: float, choice: float | None = None) -> None:
        self._estimate, self._choice = estimate, choice

    def rescored(self, scores: Scores, source: Source) -> Scores:
        """Everything that follows from the bonus, anew."""
        config, step = source.clusters.config, source.step
        base = exact_logits(source.q, source.keys, step.base_slots, step.base_count, source.scale).logsumexp(-1)
        log_size, empty = scores.size.float().log().unsqueeze(2), scores.size == 0
        estimate_bonus = config.estimate_spread * scores.bonus.clamp(max=self._estimate)
        logits = scores.dot + estimate_bonus
        total = torch.logaddexp((log_size + logits).logsumexp(-1), base)
        estimate_mass = (logits - total.unsqueeze(-1)).exp().mean(2).masked_fill(empty, 0.0)
        scores = scores._replace(estimate_bonus=estimate_bonus, estimate_mass=estimate_mass, total=total)
        if self._choice is None:
            return scores
        logits = scores.dot + config.choice_spread * scores.bonus.clamp(max=self._choice)
        normaliser = torch.logaddexp((log_size + logits).logsumexp(-1), base)
        log_mass = (logits - normaliser.unsqueeze(-1)).logsumexp(2) - math.log(logits.shape[2])
        return scores._replace(log_mass=log_mass.masked_fill(empty, -torch.inf))

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """As ours."""
        return merge(exact, our_estimate(scores, left, source))


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
        return merge(exact, our_estimate(scores, left, source._replace(clusters=other)))

    @staticmethod
    def _rows(source: Source) -> torch.Tensor:
        """Of the step's clusters; all others' are garbage."""
        values = source.mean_values()
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

    def rescored(self, scores: Scores, source: Source) -> Scores:
        """Clusters of groups that are not opened look as their group does, and can't be candidates."""
        config, scale, q = source.clusters.config, source.scale, source.q
        base = exact_logits(q, source.keys, source.step.base_slots, source.step.base_count, scale).logsumexp(-1)
        dot, bonus = scores.dot.clone(), scores.bonus.clone()
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
            group_bonus = config.estimate_spread * group_bonus.clamp(max=SPREAD_CAP)
            logits = (log_size + group_dot + group_bonus).masked_fill(opens.unsqueeze(1), -torch.inf)
            lse = logits.logsumexp(-1)
            weights = (logits - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp()
            closed.append(Partial(torch.einsum("hgn,hnd->hgd", weights, groups.value), lse))
        self._is_open = is_open
        self._closed = Partial(*(torch.stack(parts) for parts in zip(*closed, strict=True)))
        log_size = scores.size.float().log().unsqueeze(2)
        estimate_bonus = config.estimate_spread * bonus.clamp(max=SPREAD_CAP)
        choice, sober = dot + config.choice_spread * bonus, dot + estimate_bonus
        normaliser = torch.logaddexp((log_size + choice).logsumexp(-1), base)
        log_mass = (choice - normaliser.unsqueeze(-1)).logsumexp(2) - math.log(q.shape[2])
        total = torch.logaddexp((log_size + sober).logsumexp(-1), base)
        return scores._replace(
            dot=dot,
            bonus=bonus,
            estimate_bonus=estimate_bonus,
            log_mass=log_mass.masked_fill((scores.size == 0) | ~is_open, -torch.inf),
            estimate_mass=(sober - total.unsqueeze(-1)).exp().mean(2).masked_fill(scores.size == 0, 0.0),
            total=total,
        )

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """Opened groups by their clusters, closed ones by themselves."""
        return merge(merge(exact, our_estimate(scores, left * self._is_open, source)), self._closed)

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
    values = source.mean_values()[b].transpose(0, 1)  # [H, C, D]
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


class Tokens(NamedTuple):
    """All clustered tokens per request and kv head, in sequence order; padding beyond what a request has."""

    real: torch.Tensor  # bool [B, H, T]
    slot: torch.Tensor  # int64 [B, H, T]
    cluster: torch.Tensor  # int64 [B, H, T], place among the request's clusters
    keys: torch.Tensor  # float32 [B, H, T, D]
    values: torch.Tensor  # float32 [B, H, T, D]


def all_tokens(scores: Scores, source: Source) -> Tokens:
    """Every clustered token with its cluster, key and value."""
    everything = source.step.pages.shape[1] * source.clusters.geometry.page_size
    found = select(scores, source.clusters, source.layer, source.step, everything)
    heads = torch.arange(found.slot.shape[1], device=found.slot.device).view(1, -1, 1)
    real = torch.arange(found.slot.shape[2], device=found.slot.device) < found.count.unsqueeze(-1)
    keys, values = (pool[found.slot, heads].float() for pool in (source.keys, source.values))
    return Tokens(real, found.slot, found.cluster, keys, values)


class ExactInside(ChangedEstimate):
    """Each cluster has the mass that we estimate, and in it every token its exact share and its own value.

    What summaries of the values inside clusters come near to, such as a second mean value; it reads all keys and values.
    """

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """The estimate's masses, handed out to the tokens that were not recalled."""
        tokens = all_tokens(scores, source)
        slots, count = self.recalled
        batch, heads = left.shape[:2]
        listed = torch.arange(slots.shape[-1], device=slots.device) < count.unsqueeze(-1)
        # Slot 0 stands for what is not listed: no request owns it.
        recalled = torch.zeros((batch, heads, len(source.keys)), dtype=torch.bool, device=slots.device)
        recalled.scatter_(-1, torch.where(listed, slots, 0), True)
        rest = (tokens.real & ~recalled.gather(-1, tokens.slot)).unsqueeze(2)
        logits = source.scale * torch.einsum("bhgd,bhtd->bhgt", source.q, tokens.keys)
        logits = logits.masked_fill(~rest, -torch.inf)
        estimated = left.float().log().unsqueeze(2) + token_logits(scores, source.clusters, source.code)  # [B, H, G, C]
        at = tokens.cluster.unsqueeze(2).expand_as(logits)
        highest = torch.full_like(estimated, -torch.inf).scatter_reduce_(-1, at, logits, "amax").nan_to_num(neginf=0.0)
        inside = (logits - highest.gather(-1, at)).exp()
        sums = torch.zeros_like(estimated).scatter_add_(-1, at, inside)
        share = inside / sums.gather(-1, at).clamp(min=torch.finfo(torch.float32).tiny)
        lse = estimated.logsumexp(-1)
        mass = (estimated - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp()
        return merge(exact, Partial(torch.einsum("bhgt,bhtd->bhgd", mass.gather(-1, at) * share, tokens.values), lse))


class MovingValues(ChangedEstimate):
    """Mean values move with the query, as values do with keys inside the clusters of their segment.

    Within a cluster the mean value under attention differs from the plain one by about scale x Cov(v, k) q. The covariance is
    kept per segment and head, and taken times the cluster's spread.

    Args:
        weight: of that, as `estimate_spread` is that of the masses' bonus.
        rank: of the covariances that are kept; None: whole.
        shared: all segments of a request have their mean.
    """

    def __init__(self, weight: float, rank: int | None = None, shared: bool = False) -> None:
        self._weight, self._rank, self._shared = weight, rank, shared
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: rows as stored, and covariances

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """Our estimate, its output moved by every segment's weight."""
        stored = source.view.key_rows[source.rows]
        known, covariance = self._kept.get(source.layer, (stored[:0], stored))
        if not torch.equal(known, stored):
            covariance = self._covariance(scores, source)
            if self._shared:
                covariance = covariance.mean(1, keepdim=True).expand_as(covariance)
            if self._rank is not None:
                covariance = of_rank(covariance, self._rank)
            self._kept[source.layer] = stored, covariance
        ours = our_estimate(scores, left, source)
        logits = left.float().log().unsqueeze(2) + token_logits(scores, source.clusters, source.code)
        mass = (logits - torch.where(ours.lse.isfinite(), ours.lse, 0.0).unsqueeze(-1)).exp()
        wide = mass * source.view.spread[source.rows].float().transpose(1, 2).unsqueeze(2)
        segment = source.segment[:, None, None].expand_as(wide)
        wide = wide.new_zeros((*wide.shape[:3], covariance.shape[1])).scatter_add_(-1, segment, wide)
        moved = torch.einsum("bhgs,bshvk,bhgk->bhgv", wide, covariance, source.q)
        return merge(exact, ours._replace(output=ours.output + self._weight * source.scale * moved))

    @staticmethod
    def _covariance(scores: Scores, source: Source) -> torch.Tensor:
        """Of values and keys inside clusters of spread 1, float32 [B, S, H, D of values, D of keys]."""
        tokens = all_tokens(scores, source)
        real = tokens.real.float().unsqueeze(-1)
        sizes = scores.size.float().clamp(min=1.0).unsqueeze(-1)  # [B, H, C, 1]
        at = tokens.cluster.unsqueeze(-1).expand_as(tokens.keys)

        def apart(x: torch.Tensor) -> torch.Tensor:
            """Of each token from its cluster's mean."""
            means = x.new_zeros((*sizes.shape[:3], x.shape[-1])).scatter_add_(2, at, x * real) / sizes
            return (x - means.gather(2, at)) * real

        keys, values = apart(tokens.keys), apart(tokens.values)
        spread = source.view.spread[source.rows].float().transpose(1, 2).gather(-1, tokens.cluster)  # [B, H, T]
        segment = source.segment.unsqueeze(1).expand_as(scores.size).gather(-1, tokens.cluster)
        found = []
        for s in range(source.step.segment_begin.shape[1]):
            own = (segment == s) & tokens.real
            total = torch.einsum("bht,bhtv,bhtk->bhvk", own.float(), values, keys)
            found.append(total / (spread * own).sum(-1).clamp(min=1e-6)[..., None, None])
        return torch.stack(found, 1)


def of_rank(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrices of that rank, [..., D, D]."""
    u, s, v = torch.linalg.svd(x)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
