"""A decode step of ours over tables in another format, with parts of it done otherwise (`formats.Format`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks.policies.estimates import Source
from benchmarks.policies.formats import Format
from benchmarks.policies.reformed import LEAST_SHARE, LOST, MOST_SHARE, Tables, tables
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.merge.reference import Partial, merge, note_mass
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.rotation import rotation_matrix
from sglang_clusterkv.memory.step import SparseStep

MOVEMENT_WEIGHT = 0.25


class Scored(NamedTuple):
    """Clusters of one request in one layer, as `kernels.score.reference.Scores` has them."""

    dot: torch.Tensor  # float32 [H, G, C]
    bonus: torch.Tensor  # float32 [H, G, C], capped, not yet weighted
    log_mass: torch.Tensor  # float32 [H, C]
    total: torch.Tensor  # float32 [H, G]


class Candidates(NamedTuple):
    """Tokens of one request in one layer, in sequence order; those beyond `listed` are none."""

    places: torch.Tensor  # int64 [H, K]
    listed: torch.Tensor  # bool [H, K]
    cluster: torch.Tensor  # int64 [H, K]


class Recalled(NamedTuple):
    """Tokens of one request in one layer, the best first; those beyond `listed` are none."""

    at: torch.Tensor  # int64 [H, K], among the candidates
    places: torch.Tensor  # int64 [H, K]
    listed: torch.Tensor  # bool [H, K]
    logits: torch.Tensor  # float32 [H, G, K], exact; -inf where not listed


class Kept(NamedTuple):
    """What a head chose some steps ago."""

    q: torch.Tensor  # float32 [H, G, D]
    age: torch.Tensor  # int64 [H]
    taken: torch.Tensor  # float32 [H, C], candidates of each cluster


class Reformed:
    """Ours in another format.

    Args:
        form: the format.
    """

    # What the last call recalled: slots, int64 [B, H, most], and how many, int64 [B, H].
    recalled = (torch.empty(0), torch.empty(0))

    def __init__(self, form: Format) -> None:
        self._form = form
        # By layer and request: its pages with their segments, and what was made of them.
        self._tables: dict[tuple[int, int], tuple[torch.Tensor, Tables]] = {}
        self._kept: dict[tuple[int, int], Kept] = {}
        self._counts: dict[tuple[int, int], torch.Tensor] = {}  # tokens of each head by the last step's masses
        self._chosen = self._candidates = self._heads = 0.0

    def counts(self) -> dict[str, float]:
        """Candidates of a head on average, and how many heads chose them in the step itself, as a share."""
        heads = max(1.0, self._heads)
        return {"candidates": self._candidates / heads, "chosen": self._chosen / heads}

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
        source = Source(index, layer, step, scale, grouped, keys, values)
        output, chosen, counts = torch.empty_like(grouped), [], []
        for b in range(step.batch):
            t = self._tables_of(source, b)
            base = step.base_slots[b, : int(step.base_count[b])]
            base_keys, base_values = (pool[base].transpose(0, 1).float() for pool in (keys, values))
            base_logits = scale * grouped[b] @ base_keys.transpose(1, 2)
            scored = self._score(t, grouped[b], base_logits, index.config, scale)
            taken = self._taken(t, scored, grouped[b], index.config, (layer, b))
            candidates = self._candidates_of(t, taken)
            found = self._recall(t, scored, candidates, source, b)
            logits = torch.cat((base_logits, found.logits), -1)
            heads = torch.arange(keys.shape[1]).unsqueeze(1)
            own_values = values[t.slots[found.places], heads].float()
            weights = logits.softmax(-1)
            exact = Partial(weights @ torch.cat((base_values, own_values), 1), logits.logsumexp(-1))
            whole = merge(exact, self._estimate(t, scored, candidates, found, own_values, source, b))
            note_mass(index.mass_cells[layer, 0], exact.lse, whole.lse)
            output[b] = whole.output
            chosen.append(t.slots[found.places])
            counts.append(found.listed.sum(-1))
        most = max(places.shape[1] for places in chosen)
        padded = [torch.nn.functional.pad(places, (0, most - places.shape[1])) for places in chosen]
        self.recalled = torch.stack(padded), torch.stack(counts)
        return output.flatten(1, 2).to(q.dtype)

    def _tables_of(self, source: Source, b: int) -> Tables:
        """Made anew where the request's segments changed."""
        pages = source.step.pages[b, : int(source.step.page_count[b])]
        stored = torch.stack((pages, source.clusters.page_state[pages, 0].long()))
        known, made = self._tables.get((source.layer, b), (stored[:, :0], None))
        if made is None or not torch.equal(known, stored):
            made = tables(source, b, self._form)
            self._tables[source.layer, b] = stored, made
            self._kept.pop((source.layer, b), None)
        return made

    def _score(
        self, t: Tables, q: torch.Tensor, base_logits: torch.Tensor, config: ClusterKVConfig, scale: float
    ) -> Scored:
        """As `kernels.score.reference.score`."""
        dot = scale * q @ t.centroid.transpose(1, 2)
        q_variance = (q.square() @ t.variance.transpose(1, 2))[..., t.segment]
        bonus = 0.5 * scale**2 * t.spread.unsqueeze(1) * q_variance
        log_size, base = t.size.log().unsqueeze(1), base_logits.logsumexp(-1)
        choice = dot + config.choice_spread * bonus
        normaliser = torch.logaddexp((log_size + choice).logsumexp(-1), base)
        log_mass = (choice - normaliser.unsqueeze(-1)).logsumexp(1) - math.log(q.shape[1])
        bonus = bonus.clamp(max=SPREAD_CAP)
        total = torch.logaddexp((log_size + dot + config.estimate_spread * bonus).logsumexp(-1), base)
        return Scored(dot, bonus, log_mass.masked_fill(t.size == 0, -torch.inf), total)

    def _taken(
        self, t: Tables, scored: Scored, q: torch.Tensor, config: ClusterKVConfig, at: tuple[int, int]
    ) -> torch.Tensor:
        """How many tokens of each cluster are candidates, float32 [H, C]."""
        order = scored.log_mass.argsort(dim=-1, descending=True, stable=True)
        sizes = t.size.gather(-1, order)
        before = sizes.cumsum(-1) - sizes
        taken = torch.minimum(sizes, (config.candidate_tokens - before).clamp(min=0))
        if self._form.margin is not None:
            masses = scored.log_mass.gather(-1, order)
            # Of the last cluster that begins inside the budget.
            last = (before < config.budget_tokens).sum(-1, keepdim=True) - 1
            taken = torch.where(masses >= masses.gather(-1, last) - self._form.margin, taken, 0.0)
        taken = torch.zeros_like(taken).scatter_(-1, order, taken)
        chosen = torch.ones(len(q), dtype=torch.bool)
        if self._form.every > 1:
            kept = self._kept.get(at)
            if kept is not None:
                alike = torch.cosine_similarity(q, kept.q, dim=-1).amin(-1) >= self._form.least_cosine
                chosen = (kept.age + 1 >= self._form.every) | ~alike
                taken = torch.where(chosen.unsqueeze(-1), taken, kept.taken)
                self._kept[at] = Kept(
                    torch.where(chosen[:, None, None], q, kept.q), torch.where(chosen, 0, kept.age + 1), taken
                )
            else:
                self._kept[at] = Kept(q.clone(), torch.zeros(len(q), dtype=torch.int64), taken)
        self._heads += len(q)
        self._chosen += float(chosen.sum())
        self._candidates += float(taken.sum())
        return taken

    @staticmethod
    def _candidates_of(t: Tables, taken: torch.Tensor) -> Candidates:
        """The first tokens of each cluster, so many."""
        chosen = t.rank < taken.gather(-1, t.of_cluster)
        rows = chosen.nonzero()[:, 1].split(chosen.sum(-1).tolist())
        places = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        listed, places = places >= 0, places.clamp(min=0)
        return Candidates(places, listed, t.of_cluster.gather(-1, places))

    def _recall(self, t: Tables, scored: Scored, candidates: Candidates, source: Source, b: int) -> Recalled:
        """The best candidates by their codes, with their exact logits."""
        config, q, form = source.clusters.config, source.q[b], self._form
        value = self._masses(t.first, scored, candidates, source, b)
        if form.second_look:
            half = max(int(candidates.listed.sum(-1).max()) // 2, config.budget_tokens)
            better = value.topk(min(half, value.shape[1])).indices
            second = self._masses(t.second, scored, candidates, source, b)
            value = torch.full_like(value, -1.0).scatter_(1, better, second.gather(1, better))
        most = config.budget_tokens if form.shared == "never" else int(MOST_SHARE * config.budget_tokens)
        values, at = value.topk(min(most, value.shape[1]))
        places, keep = candidates.places.gather(-1, at), values >= 0
        if form.shared != "never":
            rank = torch.arange(values.shape[1])
            sure = rank < int(LEAST_SHARE * config.budget_tokens)
            everything = torch.where(keep & sure, torch.inf, values).flatten().sort(descending=True).values
            border = everything[min(len(q) * config.budget_tokens, len(everything)) - 1]
            now = (keep & ((values >= border) | sure)).sum(-1)
            count = self._counts.get((source.layer, b), now) if form.shared == "last" else now
            self._counts[source.layer, b] = now
            keep &= rank < count.unsqueeze(-1)
        heads = torch.arange(len(q)).unsqueeze(1)
        keys = source.keys[t.slots[places], heads].float()
        logits = source.scale * q @ keys.transpose(1, 2)
        return Recalled(at, places, keep, logits.masked_fill(~keep.unsqueeze(1), -torch.inf))

    def _masses(
        self, residual: torch.Tensor, scored: Scored, candidates: Candidates, source: Source, b: int
    ) -> torch.Tensor:
        """Mass of each candidate by its code, mean over the group, float32 [H, K]; -1 where it is none."""
        mass = (self._logits(residual, scored, candidates, source, b) - scored.total.unsqueeze(-1)).exp().mean(1)
        return mass.masked_fill(mass < NO_MASS, 0.0).masked_fill(~candidates.listed, -1.0)

    def _logits(
        self, residual: torch.Tensor, scored: Scored, candidates: Candidates, source: Source, b: int
    ) -> torch.Tensor:
        """Of each candidate by its code, float32 [H, G, K]."""
        q = source.q[b] @ rotation_matrix(residual.shape[-1], str(residual.device)).T
        rows = residual[torch.arange(len(q)).unsqueeze(1), candidates.places]
        own = scored.dot.gather(-1, candidates.cluster.unsqueeze(1).expand(-1, q.shape[1], -1))
        return own + source.scale * q @ rows.transpose(1, 2)

    def _estimate(
        self,
        t: Tables,
        scored: Scored,
        candidates: Candidates,
        found: Recalled,
        recalled_values: torch.Tensor,
        source: Source,
        b: int,
    ) -> Partial:
        """Of all that was not recalled."""
        config, form, q = source.clusters.config, self._form, source.q[b]
        cluster = t.of_cluster.gather(-1, found.places)  # [H, K]
        recalled = torch.zeros_like(t.size).scatter_add_(-1, cluster, found.listed.float())
        left = t.size - recalled
        at = cluster.unsqueeze(1).expand_as(found.logits)
        dot, bonus = scored.dot, config.estimate_spread * scored.bonus
        if form.left_logits:
            sums = torch.zeros_like(dot).scatter_add_(-1, at, found.logits.masked_fill(~found.listed.unsqueeze(1), 0.0))
            dot = (t.size.unsqueeze(1) * dot - sums) / left.clamp(min=1).unsqueeze(1)
        per_token = dot + bonus
        logits = left.log().unsqueeze(1) + per_token
        if form.codes_in_estimate:
            logits = self._with_codes(t, scored, candidates, found, logits, left, source, b)
            per_token = torch.where(left.unsqueeze(1) > 0, logits - left.clamp(min=1).log().unsqueeze(1), per_token)
        lse = logits.logsumexp(-1)
        weights = (logits - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp()
        mass = (per_token - scored.total.unsqueeze(-1)).exp().mean(1) * left
        mass = mass.masked_fill((mass < NO_MASS) | (t.size == 0), 0.0)
        own = torch.ones_like(mass, dtype=torch.bool)
        if form.clusters_per_value == 1 and config.estimate_clusters < mass.shape[1]:
            best = mass.argsort(dim=-1, descending=True, stable=True)[:, : config.estimate_clusters]
            own = torch.zeros_like(own).scatter_(1, best, True)
        owned = weights * own.unsqueeze(1)
        if form.left_values:
            share = owned / left.clamp(min=1).unsqueeze(1)  # of each token left
            output = (share * t.size.unsqueeze(1)) @ t.value
            output = output - (share.gather(-1, at) * found.listed.unsqueeze(1)) @ recalled_values
        else:
            output = owned @ t.value
        segments = t.segment_value.shape[1]
        by_segment = torch.nn.functional.one_hot(t.segment, segments).float()
        output = output + (weights - owned) @ by_segment @ t.segment_value
        if form.rank:
            wide = (weights * t.spread.unsqueeze(1)) @ by_segment
            moved = torch.einsum("hgs,hsvk,hgk->hgv", wide, t.movement, q)
            output = output + MOVEMENT_WEIGHT * source.scale * moved
        return Partial(output, lse)

    def _with_codes(
        self,
        t: Tables,
        scored: Scored,
        candidates: Candidates,
        found: Recalled,
        logits: torch.Tensor,
        left: torch.Tensor,
        source: Source,
        b: int,
    ) -> torch.Tensor:
        """Logits of clusters, float32 [H, G, C], whose candidates count by their codes and by what codes lose on average."""
        rest = candidates.listed.scatter(1, found.at, candidates.listed.gather(1, found.at) & ~found.listed)
        by_code = self._logits(t.second, scored, candidates, source, b)
        lost = LOST[self._form.code_bits] * scored.bonus
        peak = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        cluster = candidates.cluster.unsqueeze(1).expand_as(by_code)
        masses = torch.where(rest.unsqueeze(1), (by_code - peak).exp(), 0.0)
        sums = torch.zeros_like(logits).scatter_add_(-1, cluster, masses) * lost.exp()
        listed = torch.zeros_like(left).scatter_add_(-1, candidates.cluster, rest.float())
        others = (left - listed).unsqueeze(1) * (logits - left.clamp(min=1).log().unsqueeze(1) - peak).exp()
        others = torch.where((left - listed).unsqueeze(1) > 0, others, 0.0)
        return (sums + others).log() + peak
