"""Decode steps of ours over tables in another format, with parts of them done otherwise (`formats.Format`).

N steps of one request in one layer at once, as far as they are the same but for their queries: N is 1 in a server.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks.policies.estimates import Source
from benchmarks.policies.formats import Format
from benchmarks.policies.reformed import LEAST_SHARE, MOST_SHARE, Tables, tables
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.merge.reference import Partial, merge, note_mass
from sglang_clusterkv.memory.codec import CODE_LOSS
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.movement import CODED_WEIGHT, OTHER_WEIGHT
from sglang_clusterkv.memory.rotation import rotation_matrix
from sglang_clusterkv.memory.step import SparseStep


class Scored(NamedTuple):
    """Clusters, as `kernels.score.reference.Scores` has them."""

    dot: torch.Tensor  # float32 [N, H, G, C]
    bonus: torch.Tensor  # float32 [N, H, G, C], capped, not yet weighted
    log_mass: torch.Tensor  # float32 [N, H, C]
    total: torch.Tensor  # float32 [N, H, G]


class State(NamedTuple):
    """What a step leaves to the next one."""

    q: torch.Tensor  # float32 [H, G, D], of each head's last choice
    age: torch.Tensor  # int64 [H], steps since then
    taken: torch.Tensor  # float32 [H, C], candidates of each cluster
    read: torch.Tensor  # bool [H, T], recalled tokens
    counts: torch.Tensor  # int64 [H], tokens to recall by the masses of the last step


class Decoded(NamedTuple):
    """What steps come to."""

    whole: Partial  # [N, H, G, ...]
    exact: Partial
    read: torch.Tensor  # bool [N, H, T], recalled tokens
    state: State
    candidates: float  # of a head, sum over N and H
    chosen: int  # heads that chose anew, likewise


class Step:
    """Steps of one request in one layer.

    Args:
        t: its tables.
        form: how it is done.
        config: step options.
        scale: of the logits.
    """

    def __init__(self, t: Tables, form: Format, config: ClusterKVConfig, scale: float) -> None:
        self._t, self._form, self._config, self._scale = t, form, config, scale

    def __call__(
        self, q: torch.Tensor, base_logits: torch.Tensor, base_values: torch.Tensor, before: State | None
    ) -> Decoded:
        """N steps.

        Args:
            q: float32 [N, H, G, D].
            base_logits: float32 [N, H, G, W], of sinks, gaps and window; -inf: not there.
            base_values: float32 [H, W, D].
            before: what the step before the first one left.
        """
        t, form = self._t, self._form
        scored = self.score(q, base_logits.logsumexp(-1))
        taken = self._taken(scored)
        sources, state = self._sources(q, before)
        if form.reused == "candidates":
            taken = chosen_at(sources, taken, before.taken if before else None)
        candidates = t.rank < taken.gather(-1, t.of_cluster.expand(len(q), -1, -1))
        read, counts = self._recall(q, scored, candidates, before)
        if form.reused == "recalled":
            read = chosen_at(sources, read, before.read if before else None)
        exact_logits = dots(q, t.keys).mul_(self._scale).masked_fill_(~read.unsqueeze(2), -torch.inf)
        peak = torch.maximum(base_logits.amax(-1, keepdim=True), exact_logits.amax(-1, keepdim=True))
        of_base, of_read = (base_logits - peak).exp_(), (exact_logits - peak).exp_()
        total = of_base.sum(-1) + of_read.sum(-1)
        output = (mix(of_base, base_values) + mix(of_read, t.values)) / total.unsqueeze(-1)
        exact = Partial(output, total.log() + peak.squeeze(-1))
        rest = self._estimate(q, scored, candidates, read, exact_logits)
        state = state._replace(taken=taken[-1], read=read[-1], counts=counts)
        chosen = int((sources == torch.arange(len(q)).unsqueeze(1)).sum())
        return Decoded(merge(exact, rest), exact, read, state, float(candidates.sum()), chosen)

    def score(self, q: torch.Tensor, base: torch.Tensor) -> Scored:
        """As `kernels.score.reference.score`; base: float32 [N, H, G], log-sum-exp of what is always attended."""
        t, config = self._t, self._config
        dot = self._scale * dots(q, t.centroid)
        bonus = 0.5 * self._scale**2 * t.spread.unsqueeze(1) * dots(q.square(), t.variance)[..., t.segment]
        log_size = t.size.log().unsqueeze(1)
        choice = dot + config.choice_spread * bonus
        normaliser = torch.logaddexp((log_size + choice).logsumexp(-1), base)
        log_mass = (choice - normaliser.unsqueeze(-1)).logsumexp(2) - math.log(q.shape[2])
        bonus = bonus.clamp(max=SPREAD_CAP)
        total = torch.logaddexp((log_size + dot + config.estimate_spread * bonus).logsumexp(-1), base)
        return Scored(dot, bonus, log_mass.masked_fill(t.size == 0, -torch.inf), total)

    def _taken(self, scored: Scored) -> torch.Tensor:
        """How many tokens of each cluster are candidates, float32 [N, H, C]."""
        order = scored.log_mass.argsort(dim=-1, descending=True, stable=True)
        sizes = self._t.size.expand_as(scored.log_mass).gather(-1, order)
        before = sizes.cumsum(-1) - sizes
        taken = torch.minimum(sizes, (self._config.candidate_tokens - before).clamp(min=0))
        if self._form.margin is not None:
            masses = scored.log_mass.gather(-1, order)
            # Of the last cluster that begins inside the budget.
            last = (before < self._config.budget_tokens).sum(-1, keepdim=True) - 1
            taken = torch.where(masses >= masses.gather(-1, last) - self._form.margin, taken, 0.0)
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    def _sources(self, q: torch.Tensor, before: State | None) -> tuple[torch.Tensor, State]:
        """The step whose choice each step and head uses, int64 [N, H], -1: that of `before`; and the state's q and age."""
        sources = torch.arange(len(q)).unsqueeze(1).repeat(1, q.shape[1])
        nothing = torch.empty(0)
        if self._form.every == 1:
            return sources, State(q[-1], torch.zeros(q.shape[1], dtype=torch.int64), nothing, nothing, nothing)
        at = torch.full((q.shape[1],), -1)
        last, age = (before.q, before.age) if before else (q[0], torch.full_like(at, self._form.every))
        for n in range(len(q)):
            alike = torch.cosine_similarity(q[n], last, dim=-1).amin(-1) >= self._form.least_cosine
            chosen = (age + 1 >= self._form.every) | ~alike
            last = torch.where(chosen[:, None, None], q[n], last)
            age = torch.where(chosen, 0, age + 1)
            at = torch.where(chosen, n, at)
            sources[n] = at
        return sources, State(last, age, nothing, nothing, nothing)

    def _recall(
        self, q: torch.Tensor, scored: Scored, candidates: torch.Tensor, before: State | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best candidates by their codes, bool [N, H, T]; tokens of each head by the last step's masses, int64 [H]."""
        t, config, form = self._t, self._config, self._form
        value = self._masses(q, scored, candidates, t.first)
        if form.second_look:
            half = max(int(candidates.sum(-1).amax()) // 2, config.budget_tokens)
            better = value.topk(min(half, value.shape[-1])).indices
            second = self._masses(q, scored, candidates, t.second)
            value = torch.full_like(value, -1.0).scatter_(-1, better, second.gather(-1, better))
        most = config.budget_tokens if form.shared == "never" else int(MOST_SHARE * config.budget_tokens)
        values, at = value.topk(min(most, value.shape[-1]))
        keep, counts = values >= 0, torch.empty(0)
        if form.shared != "never":
            rank = torch.arange(values.shape[-1])
            sure = rank < int(LEAST_SHARE * config.budget_tokens)
            everything = torch.where(keep & sure, torch.inf, values).flatten(1).sort(descending=True).values
            border = everything[:, min(q.shape[1] * config.budget_tokens, everything.shape[1]) - 1]
            count = (keep & ((values >= border[:, None, None]) | sure)).sum(-1)  # [N, H]
            counts = count[-1]
            if form.shared == "last":
                count = torch.cat(((before.counts if before else count[0]).unsqueeze(0), count[:-1]))
            keep = keep & (rank < count.unsqueeze(-1))
        return torch.zeros_like(candidates).scatter_(-1, at, keep), counts

    def _masses(
        self, q: torch.Tensor, scored: Scored, candidates: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Mass of each token by its code, the group's largest or mean, float32 [N, H, T]; -1 where it is no candidate."""
        mass = (self._logits(q, scored, residual) - scored.total.unsqueeze(-1)).exp_()
        mass = mass.amax(2) if self._form.recalled_by == "largest" else mass.mean(2)
        return mass.masked_fill_(mass < NO_MASS, 0.0).masked_fill_(~candidates, -1.0)

    def _logits(self, q: torch.Tensor, scored: Scored, residual: torch.Tensor) -> torch.Tensor:
        """Of each token by its code, float32 [N, H, G, T]."""
        rotated = q @ rotation_matrix(q.shape[-1], str(q.device)).T
        at = self._t.of_cluster.unsqueeze(1).expand(len(q), -1, q.shape[2], -1)
        return scored.dot.gather(-1, at).add_(dots(rotated, residual), alpha=self._scale)

    def _estimate(
        self,
        q: torch.Tensor,
        scored: Scored,
        candidates: torch.Tensor,
        read: torch.Tensor,
        exact_logits: torch.Tensor,
    ) -> Partial:
        """Of all that was not recalled."""
        t, config, form = self._t, self._config, self._form
        left = t.size - self._by_cluster(read.float())  # [N, H, C]
        dot, bonus = scored.dot, config.estimate_spread * scored.bonus
        if form.left_logits:
            sums = self._by_cluster(exact_logits.masked_fill(~read.unsqueeze(2), 0.0))
            dot = (t.size.unsqueeze(1) * dot - sums) / left.clamp(min=1).unsqueeze(2)
        per_token = by_token = dot + bonus
        reach = config.estimate_spread * t.spread.unsqueeze(1)
        if form.codes_in_estimate:
            rest = candidates & ~read
            by_token = self._with_codes(q, scored, rest, per_token)
            coded = (self._by_cluster(rest.float()) > 0).unsqueeze(2)
            reach = torch.where(coded, CODED_WEIGHT, OTHER_WEIGHT) * t.spread.unsqueeze(1)
        logits = left.log().unsqueeze(2) + by_token
        lse = logits.logsumexp(-1)
        weights = (logits - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp()
        mass = (per_token - scored.total.unsqueeze(-1)).exp().mean(2) * left
        mass = mass.masked_fill((mass < NO_MASS) | (t.size == 0), 0.0)
        own = torch.ones_like(mass, dtype=torch.bool)
        if form.clusters_per_value == 1 and config.estimate_clusters < mass.shape[-1]:
            best = mass.argsort(dim=-1, descending=True, stable=True)[..., : config.estimate_clusters]
            own = torch.zeros_like(own).scatter_(-1, best, True)
        owned = weights * own.unsqueeze(2)
        if form.left_values:
            share = owned / left.clamp(min=1).unsqueeze(2)  # of each token left
            at = t.of_cluster.unsqueeze(1).expand_as(exact_logits)
            output = mix(share * t.size.unsqueeze(1), t.value)
            output = output - mix(share.gather(-1, at) * read.unsqueeze(2), t.values)
        else:
            output = mix(owned, t.value)
        by_segment = torch.nn.functional.one_hot(t.segment, t.segment_value.shape[1]).float()
        output = output + mix((weights - owned) @ by_segment, t.segment_value)
        if form.rank:
            wide = (weights * reach) @ by_segment
            output = output + self._scale * torch.einsum("nhgs,hsvk,nhgk->nhgv", wide, t.movement, q)
        return Partial(output, lse)

    def _with_codes(self, q: torch.Tensor, scored: Scored, rest: torch.Tensor, per_token: torch.Tensor) -> torch.Tensor:
        """Logits of a cluster's tokens, float32 [N, H, G, C]: where some are of `rest`, these tell it by their codes.

        And by what codes lose on average.
        """
        by_code = self._logits(q, scored, self._t.second).masked_fill_(~rest.unsqueeze(2), -torch.inf)
        peak = torch.maximum(by_code.amax(-1, keepdim=True), per_token.amax(-1, keepdim=True))
        number = self._by_cluster(rest.float()).unsqueeze(2)
        mean = (self._by_cluster((by_code - peak).exp_()) / number.clamp(min=1)).log() + peak
        return torch.where(number > 0, mean + CODE_LOSS[self._form.code_bits] * scored.bonus, per_token)

    def _by_cluster(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over the clusters' tokens: float32 [N, H, (G,) T] -> [N, H, (G,) C]."""
        at = self._t.of_cluster if x.dim() == 3 else self._t.of_cluster.unsqueeze(1)
        return x.new_zeros((*x.shape[:-1], self._t.size.shape[1])).scatter_add_(-1, at.expand_as(x), x)


def dots(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 [N, H, G, D] and [H, R, D] -> [N, H, G, R]."""
    found = q.transpose(0, 1).flatten(1, 2) @ rows.transpose(1, 2)
    return found.unflatten(1, (len(q), -1)).transpose(0, 1)


def mix(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 [N, H, G, R] and [H, R, D] -> [N, H, G, D]."""
    found = weights.transpose(0, 1).flatten(1, 2) @ rows
    return found.unflatten(1, (len(weights), -1)).transpose(0, 1)


def chosen_at(sources: torch.Tensor, rows: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Rows [N, H, R] of the steps that `sources`, int64 [N, H], name; -1: `before`, [H, R]."""
    first = torch.zeros_like(rows[:1]) if before is None else before.unsqueeze(0)
    return torch.cat((first, rows)).gather(0, (sources + 1).unsqueeze(-1).expand_as(rows))


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
        self._states: dict[tuple[int, int], State] = {}
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
        output, chosen = torch.empty_like(grouped), []
        for b in range(step.batch):
            t = self._tables_of(source, b)
            base = step.base_slots[b, : int(step.base_count[b])]
            base_keys, base_values = (pool[base].transpose(0, 1).float() for pool in (keys, values))
            one = grouped[b : b + 1]
            steps = Step(t, self._form, index.config, scale)
            found = steps(one, scale * dots(one, base_keys), base_values, self._states.get((layer, b)))
            self._states[layer, b] = found.state
            self._heads += keys.shape[1]
            self._candidates += found.candidates
            self._chosen += found.chosen
            note_mass(index.mass_cells[layer, 0], found.exact.lse, found.whole.lse)
            output[b] = found.whole.output[0]
            chosen += [t.slots[mine] for mine in found.read[0]]
        count = torch.tensor([len(mine) for mine in chosen])
        padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        self.recalled = padded.unflatten(0, (step.batch, -1)), count.unflatten(0, (step.batch, -1))
        return output.flatten(1, 2).to(q.dtype)

    def _tables_of(self, source: Source, b: int) -> Tables:
        """Made anew where the request's segments changed."""
        pages = source.step.pages[b, : int(source.step.page_count[b])]
        stored = torch.stack((pages, source.clusters.page_state[pages, 0].long()))
        known, made = self._tables.get((source.layer, b), (stored[:, :0], None))
        if made is None or not torch.equal(known, stored):
            made = tables(source, b, self._form)
            self._tables[source.layer, b] = stored, made
            self._states.pop((source.layer, b), None)
        return made
