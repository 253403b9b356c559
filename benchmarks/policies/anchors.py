"""Published methods that, like ours, let something stand for what they do not read: by their papers' descriptions.

Each shares one choice among the query heads of a kv head, as all policies here do. What a paper leaves to a threshold is set
so that the tokens read are the budget on average: then bytes are equal, and the threshold is the best one for these bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import msgspec
import torch

from benchmarks.policies.baselines import PublishedClusters, PublishedTables, best
from benchmarks.policies.estimates import ChangedEstimate, Source
from benchmarks.policies.policy import KeyTables, clustered_slots
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.kmeans.reference import assignment_scores, start_positions, sum_by_label
from sglang_clusterkv.kernels.merge.reference import Partial, merge
from sglang_clusterkv.kernels.score.reference import Scores
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep

LISTS = 512  # of a prompt, per kv head
TOKENS_PER_LIST = 14  # of a run that is too short for so many
CODEBOOKS = 8
ENTRIES = 16
PASSES = 10
TOKENS_PER_CENTROID = 16
COARSE_MASS = 0.99
PILOT_SHARE = 0.25


class Tokens(NamedTuple):
    """One request's tokens in one layer: clustered ones in sequence order, and the base."""

    q: torch.Tensor  # float32 [H, G, D]
    keys: torch.Tensor  # float32 [H, T, D]
    values: torch.Tensor  # float32 [H, T, D]
    base_keys: torch.Tensor  # float32 [H, W, D]
    base_values: torch.Tensor  # float32 [H, W, D]
    scale: float

    def base_lse(self) -> torch.Tensor:
        """Log-sum-exp of the base's logits, float32 [H, G]."""
        return (self.scale * self.q @ self.base_keys.transpose(1, 2)).logsumexp(-1)


class Seen(NamedTuple):
    """What a policy reads, and what stands for tokens that it does not read."""

    read: torch.Tensor  # bool [H, T]
    logits: torch.Tensor  # float32 [H, G, N], of the stand-ins; -inf: none
    values: torch.Tensor  # float32 [H, N, D]


class StandIns(ABC):
    """Attends exactly to the base and to what `see` reads, and to its stand-ins, in one softmax."""

    # What the last call recalled: slots, int64 [B, H, most], and how many, int64 [B, H].
    recalled = (torch.empty(0), torch.empty(0))

    @abstractmethod
    def see(self, tokens: Tokens, layer: int, request: int) -> Seen:
        """Choose what to read of one request in one layer."""

    def next_step(self) -> None:  # noqa: B027 - most need none
        """Called between the steps of what was seen last: by a server of all layers, elsewhere of one."""

    def attend(self, tokens: Tokens, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One request in one layer: output, float32 [H, G, D], and the tokens that were read, bool [H, T]."""
        seen = self.see(tokens, layer, request)
        exact = tokens.scale * tokens.q @ tokens.keys.transpose(1, 2)
        exact = exact.masked_fill(~seen.read.unsqueeze(1), -torch.inf)
        logits = torch.cat((tokens.scale * tokens.q @ tokens.base_keys.transpose(1, 2), exact, seen.logits), -1)
        return logits.softmax(-1) @ torch.cat((tokens.base_values, tokens.values, seen.values), 1), seen.read

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
        """See `kernels.decode.sparse_decode`."""
        grouped = q.float().unflatten(1, (keys.shape[1], -1))
        output = torch.empty_like(grouped)
        chosen = []
        for b in range(step.batch):
            slots = clustered_slots(step, b, index.geometry.page_size)
            base = step.base_slots[b, : int(step.base_count[b])]
            rows = (pool[at].transpose(0, 1).float() for at in (slots, base) for pool in (keys, values))
            own_keys, own_values, base_keys, base_values = rows
            tokens = Tokens(grouped[b], own_keys, own_values, base_keys, base_values, scale)
            output[b], read = self.attend(tokens, layer, b)
            chosen += [slots[mine] for mine in read]
        count = torch.tensor([len(mine) for mine in chosen])
        padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        self.recalled = padded.unflatten(0, (step.batch, -1)), count.unflatten(0, (step.batch, -1))
        return output.flatten(1, 2).to(q.dtype)


def lloyd(rows: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means by distance from evenly spaced starts.

    Args:
        rows: float32 [N, M, D].
        clusters: C, at most M.

    Returns:
        Centroids, float32 [N, C, D], and labels, int64 [N, M].
    """
    centroids = rows[:, start_positions(rows.shape[1], clusters, rows.device)]
    for _ in range(PASSES):
        labels = assignment_scores(rows, centroids).argmax(-1)
        sizes = torch.nn.functional.one_hot(labels, clusters).sum(1)
        sums = sum_by_label(rows, labels, clusters)
        centroids = torch.where(sizes.unsqueeze(-1) > 0, sums / sizes.clamp(min=1).unsqueeze(-1), centroids)
    return centroids, assignment_scores(rows, centroids).argmax(-1)


def by_label(rows: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of the rows with each label: float32 [H, count, D] from [H, T, D] and int64 [H, T]."""
    sums = rows.new_zeros(rows.shape[0], count, rows.shape[2])
    return sums.scatter_add_(1, labels.unsqueeze(-1).expand_as(rows), rows)


def means_of(rows: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Means of the rows with each label, 0 where there are none: as `by_label`."""
    sizes = by_label(torch.ones_like(rows[..., :1]), labels, count)
    return by_label(rows, labels, count) / sizes.clamp(min=1)


class Quantised(NamedTuple):
    """A run of keys: length times (direction of its list + an entry per codebook)."""

    lists: torch.Tensor  # float32 [H, L, D]
    labels: torch.Tensor  # int64 [H, T]
    books: torch.Tensor  # float32 [H, CODEBOOKS, ENTRIES, D / CODEBOOKS]
    codes: torch.Tensor  # int64 [H, CODEBOOKS, T]
    length: torch.Tensor  # float32 [H, T]


class QuantisedTables(KeyTables):
    """Lists by k-means over directions, what is left product-quantised."""

    def build(self, keys: torch.Tensor) -> Quantised:
        """Of one run, [H, T, D]."""
        heads, tokens, channels = keys.shape
        directions = torch.nn.functional.normalize(keys, dim=-1)
        lists, labels = lloyd(directions, max(1, min(LISTS, tokens // TOKENS_PER_LIST)))
        left = directions - lists.gather(1, labels.unsqueeze(-1).expand(-1, -1, channels))
        parts = left.unflatten(-1, (CODEBOOKS, -1)).permute(0, 2, 1, 3).flatten(0, 1)  # [H CODEBOOKS, T, D / CODEBOOKS]
        books, codes = lloyd(parts, min(ENTRIES, tokens))
        return Quantised(
            lists,
            labels,
            books.unflatten(0, (heads, CODEBOOKS)),
            codes.unflatten(0, (heads, CODEBOOKS)),
            keys.norm(dim=-1),
        )


class PqHsa(StandIns):
    """PQ-HSA: every token's logit by table look-up, the best are read; a list's others are their sum times its mean value.

    Args:
        budget_tokens: most tokens that are read per kv head.
    """

    def __init__(self, budget_tokens: int) -> None:
        self._budget = budget_tokens
        self._tables = QuantisedTables()

    def see(self, tokens: Tokens, layer: int, request: int) -> Seen:
        """See `StandIns.see`."""
        logits, labels, lists = self._looked_up(tokens, layer, request)
        everything = torch.cat((logits, tokens.base_lse().unsqueeze(-1)), -1)
        mass = everything.softmax(-1).mean(1)[:, :-1]
        read = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, best(mass, self._budget), True)
        peak = logits.amax(-1, keepdim=True)
        unread = (logits - peak).exp() * ~read.unsqueeze(1)
        sums = by_label(unread.transpose(1, 2), labels, lists).transpose(1, 2)
        return Seen(read, sums.log() + peak, means_of(tokens.values, labels, lists))

    def _looked_up(self, tokens: Tokens, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Logits by the tables, float32 [H, G, T]; each token's list, int64 [H, T]; how many lists there are."""
        logits, labels, lists = [], [], 0
        for run in cast("list[Quantised]", self._tables.of(tokens.keys, layer, request)):
            of_list = (tokens.q @ run.lists.transpose(1, 2)).gather(
                -1, run.labels.unsqueeze(1).expand(-1, tokens.q.shape[1], -1)
            )
            parts = tokens.q.unflatten(-1, (CODEBOOKS, -1))  # [H, G, CODEBOOKS, D / CODEBOOKS]
            table = torch.einsum("hgcd,hced->hgce", parts, run.books)
            found = table.gather(-1, run.codes.unsqueeze(1).expand(-1, parts.shape[1], -1, -1)).sum(2)
            logits.append(tokens.scale * run.length.unsqueeze(1) * (of_list + found))
            labels.append(run.labels + lists)
            lists += run.lists.shape[1]
        return torch.cat(logits, -1), torch.cat(labels, 1), lists


class DoubleP(StandIns):
    """Double-P (arXiv 2602.05191): clusters by size times exp(q.centroid) up to a share of the mass; of these the first ones,
    up to a smaller share, are read, the others stand for themselves by centroid and mean value.

    The smaller share is one for all heads of a layer, and follows the tokens read, so that their mean is the budget.

    Args:
        budget_tokens: that are read per kv head, on average.
    """

    def __init__(self, budget_tokens: int) -> None:
        self._budget = budget_tokens
        self._tables = PublishedTables(TOKENS_PER_CENTROID)
        self._unread: dict[int, float] = {}  # by layer: 1 - the smaller share
        self._step: list[int] = []  # lengths of the requests in the step under way
        self._read: dict[int, list[float]] = {}  # by layer: tokens per kv head of each request

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
        """See `kernels.decode.sparse_decode`."""
        lengths = (step.page_count * index.geometry.page_size + step.base_count).tolist()
        if layer == 0 and lengths != self._step:
            self.next_step()
            self._step = lengths
        return super().__call__(q, keys, values, index, layer, step, scale)

    def see(self, tokens: Tokens, layer: int, request: int) -> Seen:
        """See `StandIns.see`."""
        runs = cast("list[PublishedClusters]", self._tables.of(tokens.keys, layer, request))
        labels, first = [], 0
        for run in runs:
            labels.append(run.labels + first)
            first += run.sizes.shape[1]
        of_cluster = torch.cat(labels, 1)
        sizes = torch.cat([run.sizes for run in runs], 1).float()
        centroids = torch.cat([run.centroids for run in runs], 1)
        values = means_of(tokens.values, of_cluster, first)
        logits = tokens.scale * tokens.q @ centroids.transpose(1, 2) + sizes.log().unsqueeze(1)
        mass = torch.cat((logits, tokens.base_lse().unsqueeze(-1)), -1).softmax(-1).mean(1)
        order = mass[:, :-1].argsort(dim=-1, descending=True, stable=True)
        # What remains when a cluster and all before it are taken; the base is taken in any case.
        after = 1 - mass[:, -1:] - mass.gather(1, order).cumsum(-1)
        before = after + mass.gather(1, order)
        tokens_before = sizes.gather(1, order).cumsum(-1)
        if layer not in self._unread:
            self._unread[layer] = self._first_share(before, tokens_before)
        read_in_order = before > self._unread[layer]
        if tokens.keys.shape[1] <= self._budget:
            read_in_order = torch.ones_like(read_in_order)
        read = torch.zeros_like(read_in_order).scatter_(1, order, read_in_order)
        kept = torch.zeros_like(read_in_order).scatter_(1, order, before > 1 - COARSE_MASS)
        chosen = read.gather(1, of_cluster)
        self._read.setdefault(layer, []).append(float(chosen.sum(-1).float().mean()))
        return Seen(chosen, logits.masked_fill((read | ~kept).unsqueeze(1), -torch.inf), values)

    def _first_share(self, before: torch.Tensor, tokens_before: torch.Tensor) -> float:
        """What a layer has to leave unread for its tokens to be the budget on average."""
        borders = before.flatten().sort(descending=True).values
        low, high = 0, len(borders) - 1
        while low < high:
            middle = (low + high) // 2
            taken = torch.where(before > borders[middle], tokens_before, 0.0).amax(-1).mean()
            low, high = (middle + 1, high) if taken < self._budget else (low, middle)
        return max(float(borders[low]), 1e-6)

    def next_step(self) -> None:
        """Leave more unread where the last step read more than the budget."""
        for layer, read in self._read.items():
            change = sum(read) / len(read) / self._budget - 1
            self._unread[layer] = min(max(self._unread[layer] * math.exp(min(max(change, -1.0), 1.0)), 1e-6), 0.9)
        self._read = {}


class HalfBudget:
    """An index whose configuration recalls half of its budget."""

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self.config = VAttention.configured(index.config)

    def __getattr__(self, name: str) -> object:
        return getattr(self._index, name)


class VAttention(ChangedEstimate):
    """vAttention (arXiv 2510.05688): the best tokens, here by our chain, and a random sample of the others, each of which
    stands for as many as were not drawn.

    Half of the budget is the best tokens. The sample is shared among a layer's kv heads as the bound asks: so that the relative
    error of the sum of weights is the same, with the same probability, by the variance that a pilot sample has.
    """

    seed = 0

    @staticmethod
    def configured(config: ClusterKVConfig) -> ClusterKVConfig:
        """Our chain recalls half of the budget."""
        return msgspec.structs.replace(config, budget_tokens=max(1, config.budget_tokens // 2))

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
        """See `kernels.decode.sparse_decode`."""
        return super().__call__(q, keys, values, cast("ClusterIndex", HalfBudget(index)), layer, step, scale)

    def whole(self, exact: Partial, scores: Scores, left: torch.Tensor, source: Source) -> Partial:
        """What was read, and the sample."""
        random = torch.Generator().manual_seed(
            (self.seed * 1_009 + source.layer) * 1_000_003 + int(source.step.base_slots.max())
        )
        slots, counts = self.recalled
        half = source.clusters.config.budget_tokens
        chosen, parts = [], []
        for b in range(source.q.shape[0]):
            tokens = clustered_slots(source.step, b, source.clusters.geometry.page_size)
            others = [
                tokens[~torch.isin(tokens, slots[b, h, : counts[b, h]])][
                    torch.randperm(len(tokens) - int(counts[b, h]), generator=random)
                ]
                for h in range(slots.shape[1])
            ]
            rows = [Others(source.keys[:, h], source.values[:, h], mine) for h, mine in enumerate(others)]
            part, sizes = sample(source.q[b], rows, exact.lse[b], half, source.scale)
            parts.append(part)
            chosen += [torch.cat((slots[b, h, : counts[b, h]], others[h][:n])) for h, n in enumerate(sizes)]
        sampled = Partial(torch.stack([part.output for part in parts]), torch.stack([part.lse for part in parts]))
        count = torch.tensor([len(mine) for mine in chosen]).unflatten(0, (source.q.shape[0], -1))
        padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        self.recalled = padded.unflatten(0, (source.q.shape[0], -1)), count
        return merge(exact, sampled)


class Others(NamedTuple):
    """What a kv head may draw from."""

    keys: torch.Tensor  # [N, D]
    values: torch.Tensor  # [N, D]
    order: torch.Tensor  # int64 [M], rows in random order

    def logits(self, q: torch.Tensor, count: int, scale: float) -> torch.Tensor:
        """Of the first ones, float32 [G, count]."""
        return scale * q @ self.keys[self.order[:count]].float().T


def sample(
    q: torch.Tensor, others: list[Others], lse: torch.Tensor, half: int, scale: float
) -> tuple[Partial, list[int]]:
    """Random tokens of each kv head that stand for all that it did not read, and how many; `half` of them on average.

    Args:
        q: float32 [H, G, D].
        others: by kv head.
        lse: float32 [H, G], of what was read.
        half: tokens.
        scale: of the logits.
    """
    pilot = max(2, int(PILOT_SHARE * half))
    need, most = [], torch.tensor([len(rows.order) for rows in others], dtype=torch.float64)
    for h, rows in enumerate(others):
        logits = rows.logits(q[h], pilot, scale).double()
        if logits.shape[1] < 2:
            need.append(torch.zeros((), dtype=torch.float64))
            continue
        weights = (logits - lse[h].double().unsqueeze(-1)).exp()
        total = 1 + len(rows.order) * weights.mean(-1)
        # In proportion to the squared relative deviation of the sum of weights.
        need.append((len(rows.order) * weights.std(-1) / total).square().amax().clamp(max=1e30))
    sizes = share(torch.stack(need), torch.full_like(most, pilot).minimum(most), most, half * len(others))
    counts = [int(n) for n in sizes]
    parts = [_drawn(q[h], rows, n, scale) for h, (rows, n) in enumerate(zip(others, counts, strict=True))]
    return Partial(torch.stack([part.output for part in parts]), torch.stack([part.lse for part in parts])), counts


def _drawn(q: torch.Tensor, others: Others, count: int, scale: float) -> Partial:
    """The first `count` tokens, standing for all of them; q: float32 [G, D]."""
    if not count:
        return Partial(torch.zeros_like(q), torch.full_like(q[:, 0], -torch.inf))
    logits = others.logits(q, count, scale) + math.log(max(1, len(others.order)) / count)
    return Partial(logits.softmax(-1) @ others.values[others.order[:count]].float(), logits.logsumexp(-1))


def share(need: torch.Tensor, least: torch.Tensor, most: torch.Tensor, total: float) -> torch.Tensor:
    """`total` in proportion to `need` between `least` and `most`, whole numbers; float64 [N] all."""
    low, high = 0.0, float(total / need[need > 0].min()) if (need > 0).any() else 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * need).clamp(least, most).sum() <= total else (low, middle)
    return (low * need).clamp(least, most).floor()
