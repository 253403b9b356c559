"""Select's kernel chooses exactly what the torch reference chooses from the same masses, ties included.

Red when: a mass or a total is wrong, a tie is broken upwards, a cluster is taken twice, not at all or beyond the limit, the
last one is not cut, an empty cluster's neighbour gets its tokens, a candidate names a wrong entry, or poison is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.estimate.triton_own import HELD, has_shortlist
from sglang_clusterkv.kernels.score.reference import Scores
from sglang_clusterkv.kernels.select.reference import select as reference_select
from sglang_clusterkv.kernels.select.triton import block_bits, select, sum_bits
from sglang_clusterkv.kernels.triton_threshold import bracket
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS, WorkspaceShape, make_workspace
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.step import SparseStep
from tests.support.filled import FAR, Guarded, of_request

PAGE, PER_PAGE, HEAD_DIM = 16, 2, 16

Sizes = Callable[[int, int, torch.Generator], torch.Tensor]
Logits = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


@triton.jit
def bracket_kernel(keys, weights, limit, out, BLOCK: tl.constexpr, BITS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    low, high, room, between = bracket(tl.load(keys + i), tl.load(weights + i), limit, BITS)
    tl.store(out, low)
    tl.store(out + 1, high)
    tl.store(out + 2, room)
    tl.store(out + 3, between)


@pytest.mark.parametrize("distinct", [1, 3, 1000, 2**31 - 2])
@pytest.mark.parametrize("limit", [1, 100, 1999])
@pytest.mark.parametrize("bits", [0, 12, 23])
def test_the_bracket_holds_the_border_and_nothing_else(distinct: int, limit: int, bits: int, device: str) -> None:
    generator = torch.Generator().manual_seed(limit)
    keys = torch.randint(0, distinct, (512,), generator=generator, dtype=torch.int32)
    weights = torch.randint(0, 9, (512,), generator=generator, dtype=torch.int32)
    keys[::7], weights[::7] = -1, 5  # never count
    out = torch.zeros(4, dtype=torch.int32, device=device)
    bracket_kernel[(1,)](keys.to(device), weights.to(device), limit, out, BLOCK=512, BITS=bits)
    low, high, room, between = out.tolist()
    real = keys >= 0
    inside = real & (keys >= low) & (keys < high)
    above = int(weights[real & (keys >= high)].sum())
    if weights[real].sum() <= limit:
        assert (low, high, between) == (0, 0, 0)
    else:
        assert room == limit - above > 0
        assert above + int(weights[inside].sum()) >= limit
        assert inside.sum() == between
        assert between == 1 or len(set(keys[inside].tolist())) == 1


class Case:
    """A step and scores made by hand: any sizes, any logits, no keys.

    Args:
        segments: pages of each segment, per request.
        logits: makes float32 logits of a shape.
        sizes: makes the sizes of a segment's clusters, of so many that hold so many tokens, int64 [n].
        heads, group: kv heads, query heads of each.
        own: clusters that the estimate takes at their own mean value.
    """

    def __init__(
        self, device: str, segments: list[list[int]], logits: Logits, sizes: Sizes, heads: int = 1, group: int = 2,
        own: int = 512,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        batch, pages = len(segments), [sum(request) for request in segments]
        config = ClusterKVConfig(budget_tokens=8, estimate_clusters=own)
        self.index = ClusterIndex(config, Geometry(1, heads, HEAD_DIM, PAGE, sum(pages) + 1), device)
        self.step = self._step(segments, pages, device)
        shape = (batch, heads, group, max(pages) * PER_PAGE)
        size = torch.zeros(batch, heads, shape[-1], dtype=torch.int64)
        for b, request in enumerate(segments):
            for h in range(heads):
                parts = torch.cat([sizes(count * PER_PAGE, count * PAGE, generator) for count in request])
                size[b, h, : len(parts)] = parts
        for b in range(batch):
            members = torch.cat([torch.arange(n * PAGE, dtype=torch.int16) for n in segments[b]])
            slots = self.step.pages[b, : pages[b]].cpu().unsqueeze(1) * PAGE + torch.arange(PAGE)
            self.index.layer(0).members[slots.flatten()] = members.unsqueeze(1).to(device)
        self.size, self.begin = size.to(device), (size.cumsum(-1) - size).to(device)
        self.dot = logits(shape, generator).to(device)
        self.spread = torch.rand(size.shape, generator=generator).bfloat16().to(device)
        self.bonus = 6 * torch.rand(*shape[:3], max(map(len, segments)), generator=generator).to(
            device
        )  # some above the cap
        self.base = torch.randn(*shape[:3], self.step.base_slots.shape[1], generator=generator).to(device)
        self.fill(device)

    def _step(self, segments: list[list[int]], pages: list[int], device: str) -> SparseStep:
        batch, most = len(pages), max(map(len, segments))
        listed = torch.zeros(batch, max(pages), dtype=torch.int64)
        ordinal = torch.zeros_like(listed)
        begin = torch.full((batch, most), 1 << 20)
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(2)) + 1
        for b, request in enumerate(segments):
            listed[b, : pages[b]], order = order[: pages[b]], order[pages[b] :]
            counts = torch.tensor(request)
            ordinal[b, : pages[b]] = torch.arange(len(request)).repeat_interleave(counts)
            begin[b, : len(request)] = counts.cumsum(0) - counts
        step = SparseStep(
            batch, listed, torch.tensor(pages), ordinal, begin, torch.tensor([len(request) for request in segments]),
            torch.zeros(batch, 70, dtype=torch.int64), torch.tensor([70, 33, 1][:batch]), max(pages) * PAGE,
            torch.zeros(batch, dtype=torch.int64),
        )  # fmt: skip
        return SparseStep(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in step))

    def _logits(self, weight: float, cap: float = math.inf) -> torch.Tensor:
        """log n + dot + weight * min(bonus, cap)."""
        segment = self.step.segment_of_page.repeat_interleave(PER_PAGE, 1)[:, None, None].expand_as(self.dot)
        bonus = self.spread.float().unsqueeze(2) * self.bonus.gather(-1, segment)
        return self.size.float().log().unsqueeze(2) + self.dot + weight * bonus.clamp(max=cap)

    def fill(self, device: str) -> None:
        """Put all of it into a new workspace, as score would."""
        batch, heads, group, clusters = self.dot.shape
        tokens = self.base.shape[-1]
        room = [math.ceil(int(pages) * PER_PAGE / SCORE_CLUSTERS) * SCORE_CLUSTERS for pages in self.step.page_count]
        shape = WorkspaceShape(
            batch, heads, group, HEAD_DIM, sum(room), self.bonus.shape[-1], tokens, 1200, 8,
            self.index.config.estimate_clusters, 1, 1,
        )  # fmt: skip
        self.guarded = Guarded(device)
        self.w = make_workspace(shape, device, self.guarded)
        self.w.offset[:] = torch.tensor([0, *itertools.accumulate(room)])
        config = self.index.config
        choice, estimate = self._logits(config.choice_spread), self._logits(config.estimate_spread, SPREAD_CAP)
        for b in range(batch):
            own, listed = int(self.step.page_count[b]) * PER_PAGE, int(self.step.base_count[b])
            segments = int(self.step.segment_count[b])
            of_request(self.w, self.w.dot, b, own)[:] = self.dot[b, :, :, :own]
            of_request(self.w, self.w.spread, b, own)[:] = self.spread[b, :, :own]
            of_request(self.w, self.w.left, b, own)[:] = self.size[b, :, :own].int()
            self.w.segment_bonus[b, :, :, :segments] = self.bonus[b, :, :, :segments]
            for tile in range(math.ceil(listed / SCORE_TOKENS)):
                part = self.base[b, :, :, tile * SCORE_TOKENS : min((tile + 1) * SCORE_TOKENS, listed)]
                self.w.base_lse[b, :, :, tile] = part.logsumexp(-1)
            first = int(self.w.offset[b]) // SCORE_CLUSTERS
            for lse, logits in ((self.w.choice_lse, choice), (self.w.estimate_lse, estimate)):
                for tile in range(math.ceil(own / SCORE_CLUSTERS)):
                    part = logits[b, :, :, tile * SCORE_CLUSTERS : min((tile + 1) * SCORE_CLUSTERS, own)]
                    lse[:, :, first + tile] = part.logsumexp(-1)
        beyond = torch.arange(tokens, device=device) >= self.step.base_count.unsqueeze(1)
        base = self.base.masked_fill(beyond[:, None, None], -torch.inf)
        self.total = torch.cat((estimate, base), -1).logsumexp(-1)
        normaliser = torch.cat((choice, base), -1).logsumexp(-1)
        of_one = choice - self.size.float().log().unsqueeze(2)
        log_mass = (of_one - normaliser.unsqueeze(-1)).logsumexp(2) - math.log(of_one.shape[2])
        self.log_mass = log_mass.masked_fill(self.size == 0, -torch.inf)
        of_one = estimate - self.size.float().log().unsqueeze(2)
        self.estimate_mass = (of_one - self.total.unsqueeze(-1)).exp().mean(2).masked_fill(self.size == 0, 0.0)

    def check(self, limit: int) -> None:
        """Select up to `limit` tokens and compare."""
        w, step = self.w, self.step
        select(self.index, step, limit, w)
        torch.testing.assert_close(w.total, self.total, rtol=1e-5, atol=1e-5)
        log_mass, estimate_mass = torch.full_like(self.log_mass, -torch.inf), torch.zeros_like(self.estimate_mass)
        for b in range(step.batch):
            own = int(step.page_count[b]) * PER_PAGE
            log_mass[b, :, :own] = of_request(w, w.log_mass, b, own)
            estimate_mass[b, :, :own] = of_request(w, w.estimate_mass, b, own)
        torch.testing.assert_close(log_mass, self.log_mass, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(estimate_mass, self.estimate_mass, rtol=1e-4, atol=1e-30)
        scores = Scores(self.size, self.begin, self.dot, self.dot, self.dot, log_mass, estimate_mass, self.total)
        expected = reference_select(scores, self.index, 0, step, limit)
        assert torch.equal(w.candidate_count.long(), expected.count)
        for b in range(step.batch):
            place = {int(page): at for at, page in enumerate(step.pages[b, : int(step.page_count[b])])}
            for h in range(log_mass.shape[1]):
                count = int(expected.count[b, h])
                entries = [
                    place[slot // PAGE] * PAGE + slot % PAGE for slot in expected.entry_slot[b, h, :count].tolist()
                ]
                named = sorted(zip(expected.cluster[b, h, :count].tolist(), entries, strict=True))
                found = w.candidates[b, h, :count].tolist()
                assert [(packed >> 32, packed & 0xFFFFFFFF) for packed in found] == named
        self._check_shortlist(estimate_mass)
        self.guarded.assert_untouched()

    def _check_shortlist(self, estimate_mass: torch.Tensor) -> None:
        """It has the largest masses, the lower places where they tie, ascending; nothing where there is none."""
        config = self.index.config
        for b in range(self.step.batch):
            own = int(self.step.page_count[b]) * PER_PAGE
            count = min(config.estimate_clusters + config.budget_tokens, own)
            count *= has_shortlist(config, self.step.pages.shape[1] * PER_PAGE)
            mass = estimate_mass[b, :, :own] * self.size[b, :, :own]
            mass = mass.masked_fill(mass < NO_MASS, 0.0)
            best = mass.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
            assert torch.equal(self.w.shortlist[b, :, :count].long(), best)
            assert (self.w.shortlist[b, :, count:] == FAR).all()


def even(clusters: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Sizes that are all the same."""
    return torch.full((clusters,), tokens // clusters)


def uneven(clusters: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random sizes, a good third of them 0."""
    chance = torch.rand(clusters, generator=generator).sub(0.4).clamp(min=0) + 1e-9
    which = chance.multinomial(tokens, replacement=True, generator=generator)
    return which.bincount(minlength=clusters)


def test_elements_are_summed_beside_weights_where_both_fit() -> None:
    """In a list they may fill 31 bits, in a bracket all of 32 but for one element."""
    assert [sum_bits(clusters, 8) for clusters in HELD] == [14, 16, 18]
    assert sum_bits(16384, 16) == 0 and sum_bits(4096, 256) == 0
    assert block_bits(4096, 8, 2048) == 16 and block_bits(4096, 8, 16384) == 16 and block_bits(4096, 8, 32768) == 0


def one_only(clusters: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """One cluster has all tokens."""
    return torch.tensor([0] * (clusters - 1) + [tokens])


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=generator)


def equal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.full(shape, 1.5)


def few(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Three values, one so low that the mass is 0, the same for all query heads."""
    which = torch.randint(0, 3, (*shape[:2], 1, shape[3]), generator=generator).expand(shape)
    return torch.tensor([0.0, 1.0, -300.0])[which]


RAGGED = [[5, 4, 64], [4], [16, 7]]


@pytest.mark.parametrize("limit", [1, 37, 160, 1200])
def test_select_equals_the_reference(limit: int, device: str) -> None:
    Case(device, RAGGED, normal, uneven, heads=2, group=3).check(limit)


@pytest.mark.parametrize("logits", [equal, few])
@pytest.mark.parametrize("sizes", [even, uneven])
@pytest.mark.parametrize("limit", [9, 160])
def test_ties_go_to_the_lower_place(logits: Logits, sizes: Sizes, limit: int, device: str) -> None:
    case = Case(device, RAGGED[1:], logits, sizes)
    case.spread.zero_()
    case.fill(device)
    case.check(limit)


def test_one_cluster_with_all_tokens_is_cut(device: str) -> None:
    Case(device, [[6, 4]], normal, one_only, group=1).check(70)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_every_group_size(group: int, device: str) -> None:
    Case(device, [[9]], normal, uneven, group=group).check(40)


@pytest.mark.parametrize(("own", "logits"), [(4, normal), (4, few), (60, few), (1, equal)])
def test_the_shortlist_has_the_largest_masses(own: int, logits: Logits, device: str) -> None:
    case = Case(device, [[30, 20], [8]], logits, uneven, heads=2, own=own)
    assert has_shortlist(case.index.config, 50 * PER_PAGE) == (own < 60)
    case.check(50)


def test_a_context_of_128k_tokens(device: str) -> None:
    """16,384 clusters of one (request, kv head)."""
    Case(device, [[64] * 128], normal, uneven, group=1).check(200)


def test_more_clusters_than_registers_hold(device: str) -> None:
    """Of a context of 136k tokens: masses and, where many are equal, places are looked for in memory."""
    Case(device, [[64] * 133], few, uneven, group=1).check(1200)
