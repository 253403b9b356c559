"""Refine's kernels recall what the torch reference recalls: the best candidates by their codes, ties to the lower position.

Red when: a code, scale, member list or query is mixed up or unpacked wrongly, a tie is broken upwards, more or less than the
budget is recalled, a cluster's rest is miscounted, a slot is cut to 32 bits, or poison is read.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.refine import triton as refine_triton
from sglang_clusterkv.kernels.refine.reference import Recalled, candidate_logits, candidate_scores, recall, recall_all
from sglang_clusterkv.kernels.refine.triton import recall as recall_triton
from sglang_clusterkv.kernels.select.reference import Candidates, select
from sglang_clusterkv.memory.rotation import rotation_matrix
from tests.support.filled import FAR, SCALE, Filled, of_request

FIELDS = {"budget_tokens": 48, "candidate_tokens": 160, "segment_tokens": 256, "estimate_clusters": 20}


class Chosen(Filled):
    """A step whose workspace holds what the references give up to the candidates, and poison in what refine writes."""

    candidates: Candidates

    @property
    def short(self) -> tuple[int, int]:
        """Clusters of own mean values, and what a shortlist has beyond these."""
        return self.config.estimate_clusters, self.config.budget_tokens

    def __init__(self, config: ClusterKVConfig, device: str, **sizes: object) -> None:
        super().__init__(config, device, **sizes)  # type: ignore[arg-type]
        self._fill_scores()
        decoder = self.decoder
        self.candidates = select(self.scores, self.index, 0, self.step, decoder.limit)
        w, page = decoder.workspace, self.index.geometry.page_size
        w.recalled.fill_(FAR)
        w.recalled_count.fill_(FAR)
        w.rotated[: self.step.batch] = self.wide @ rotation_matrix(self.wide.shape[-1]).T.to(device)
        w.candidate_count[: self.step.batch] = self.candidates.count.int()
        self.order: dict[tuple[int, int], torch.Tensor] = {}  # of the reference's candidates in the workspace
        for b in range(self.step.batch):
            own = int(self.step.page_count[b]) * self.index.clusters_per_page
            of_request(w, w.left, b, own)[:] = self.scores.size[b, :, :own].int()
            short = largest(self.scores.estimate_mass[b, :, :own] * self.scores.size[b, :, :own], sum(self.short))
            w.shortlist[b, :, : short.shape[1]] = short.int()
            at = torch.zeros(self.index.geometry.pages, dtype=torch.int64, device=device)
            at[self.step.pages[b]] = torch.arange(self.step.pages.shape[1], device=device)
            for h in range(self.wide.shape[1]):
                count = int(self.candidates.count[b, h])
                slots = self.candidates.entry_slot[b, h, :count]
                packed = (self.candidates.cluster[b, h, :count] << 32) + at[slots // page] * page + slots % page
                packed, self.order[b, h] = packed.sort()
                w.candidates[b, h, :count] = packed

    def fill_values(self, value: torch.Tensor) -> None:
        """Take these values [B, H, K], in the reference's order, as those of the candidates."""
        w = self.decoder.workspace
        for (b, h), order in self.order.items():
            w.value[b, h, : len(order)] = value[b, h][order]
            w.position[b, h, : len(order)] = self.candidates.position[b, h][order].int()

    def assert_recalled(self, expected: Recalled, page_offset: int = 0) -> None:
        """The workspace has these tokens, in any order, and what is left of the clusters."""
        w = self.decoder.workspace
        for b, h in self.order:
            count = int(expected.count[b, h])
            assert int(w.recalled_count[b, h]) == count
            slots = expected.slots[b, h, :count] + page_offset
            assert torch.equal(w.recalled[b, h, :count].sort().values, slots.sort().values)
            assert (w.recalled[b, h, count:] == FAR).all(), "slots beyond the count"
            own = int(self.step.page_count[b]) * self.index.clusters_per_page
            assert torch.equal(of_request(w, w.left, b, own)[h], expected.left[b, h, :own].int())
            if self.config.refine:
                mass = of_request(w, w.estimate_mass, b, own)[h] * expected.left[b, h, :own]
                assert w.own[b, h].tolist()[:own] == largest(mass, self.short[0]).tolist()
        self.guarded.assert_untouched()


def largest(mass: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` largest masses [..., C], ascending; ties go to the lower one."""
    return mass.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


def config_of(**fields: object) -> ClusterKVConfig:
    return ClusterKVConfig(**(FIELDS | fields))


@pytest.mark.parametrize(
    ("head_dim", "group", "bits", "kv_heads"),
    [(64, 3, 2, 2), (64, 7, 1, 1), (32, 1, 1, 2), (32, 8, 2, 1), (96, 4, 2, 1), (128, 4, 1, 1), (256, 1, 2, 1)],
)
def test_values_equal_the_reference(head_dim: int, group: int, bits: int, kv_heads: int, device: str) -> None:
    chosen = Chosen(config_of(code_bits=bits), device, head_dim=head_dim, group=group, kv_heads=kv_heads)
    chosen.decoder.refine(0, SCALE, torch.float32)
    w = chosen.decoder.workspace
    logits = candidate_logits(chosen.wide, chosen.scores, chosen.candidates, chosen.index, 0, SCALE)
    expected = candidate_scores(logits, chosen.scores, chosen.candidates)
    for (b, h), order in chosen.order.items():
        count = len(order)
        assert torch.equal(w.position[b, h, :count], chosen.candidates.position[b, h][order].int())
        # On a GPU products are made in float16.
        tolerance = 1e-4 if device == "cpu" else 2e-2
        torch.testing.assert_close(w.value[b, h, :count], expected[b, h][order], rtol=tolerance, atol=0)
        assert w.value[b, h, count:].isnan().all(), "values beyond the candidates"
    chosen.guarded.assert_untouched()


def test_many_candidates_of_a_program_have_the_same_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Chosen(config_of(), device)
    chosen.decoder.refine(0, SCALE, torch.float32)
    few = chosen.decoder.workspace.value.clone()
    monkeypatch.setattr(grids, "CANDIDATE_PROGRAMS", 1)
    chosen.decoder.workspace.value.fill_(torch.nan)
    chosen.decoder.refine(0, SCALE, torch.float32)
    torch.testing.assert_close(chosen.decoder.workspace.value, few, equal_nan=True)


@pytest.mark.parametrize("budget", [1, 48, 159])
@pytest.mark.parametrize("levels", [1, 4, None])
def test_the_best_are_recalled_and_ties_go_to_the_lower_position(budget: int, levels: int | None, device: str) -> None:
    chosen = Chosen(config_of(budget_tokens=budget), device, head_dim=32)
    generator = torch.Generator().manual_seed(budget)
    value = torch.rand(chosen.candidates.position.shape, generator=generator).to(device)
    value = value if levels is None else (value * levels).floor()  # 0 among them: masses vanish
    listed = torch.arange(value.shape[-1], device=device) < chosen.candidates.count.unsqueeze(-1)
    value = torch.where(listed, value, -1.0)
    chosen.fill_values(value)
    chosen.decoder.recall(0)
    chosen.assert_recalled(recall(value, chosen.scores, chosen.candidates, budget))


@pytest.mark.parametrize(
    ("group", "bits", "programs", "runs"), [(1, 2, 2, None), (3, 1, 1, None), (4, 2, 2, 4), (4, 2, 1, 4)]
)
def test_candidates_that_are_left_tell_their_clusters_logits(
    group: int, bits: int, programs: int, runs: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their codes; every other cluster's stays what it was. runs: clusters at a time, None: as many as there are threads."""
    monkeypatch.setattr(grids, "choice_programs", lambda pairs, shared: programs if shared else 1)
    if runs is not None:
        constants = refine_triton.choice_constants
        monkeypatch.setattr(refine_triton, "choice_constants", lambda *of: constants(*of) | {"RUNS": runs})
    chosen = Chosen(config_of(code_bits=bits), device, group=group)
    w, expected = chosen.decoder.workspace, chosen.recalled
    chosen.decoder.refine(0, SCALE, torch.float32)
    chosen.decoder.recall(0)
    chosen.assert_recalled(expected)
    assert expected.code is not None
    sizes = [(w.candidates[b, h, : len(order)] >> 32).bincount() for (b, h), order in chosen.order.items()]
    assert max(int(size.max()) for size in sizes) > 8, "a cluster's codes take more than one step"
    for b in range(chosen.step.batch):
        own = int(chosen.step.page_count[b]) * chosen.index.clusters_per_page
        code, dot = expected.code[b, :, :, :own], of_request(w, w.dot, b, own)
        told = code > -torch.inf
        assert 4 < int(told[:, 0].sum()) < told[:, 0].numel() and torch.equal(told, told[:, :1].expand_as(told))
        tolerance = 1e-4 if device == "cpu" else 2e-2
        torch.testing.assert_close(dot[told], code[told], rtol=tolerance, atol=tolerance)
        assert torch.equal(dot[~told], chosen.scores.dot[b, :, :, :own][~told])
        stored = chosen.index.layer(0).spread[chosen.index.cluster_rows(chosen.step.pages[b]).flatten()[:own]].T
        assert torch.equal(of_request(w, w.spread, b, own), torch.where(told[:, 0], -stored, stored))


def test_without_codes_no_logit_changes(device: str) -> None:
    chosen = Chosen(config_of(estimate_codes=False), device, group=1)
    w = chosen.decoder.workspace
    before = [tensor.clone() for tensor in (w.dot, w.spread, w.by_code)]
    chosen.decoder.refine(0, SCALE, torch.float32)
    chosen.decoder.recall(0)
    for tensor, kept in zip((w.dot, w.spread, w.by_code), before, strict=True):
        torch.testing.assert_close(tensor, kept, rtol=0, atol=0, equal_nan=True)


def test_a_budget_beyond_the_candidates_recalls_them_all(device: str) -> None:
    chosen = Chosen(config_of(budget_tokens=200), device, head_dim=32)
    value = torch.rand(chosen.candidates.position.shape, generator=torch.Generator().manual_seed(0)).to(device)
    chosen.fill_values(value)
    chosen.decoder.recall(0)
    chosen.assert_recalled(recall(value, chosen.scores, chosen.candidates, 200))


@pytest.mark.parametrize(("own", "budget"), [(4, 8), (1, 20), (20, 9), (20, 100)])
@pytest.mark.parametrize("levels", [1, 3, None])
def test_the_own_clusters_come_from_a_shortlist(own: int, budget: int, levels: int | None, device: str) -> None:
    """Those with the most mass after recalling, also of many that tie; with 100 tokens to recall there is no shortlist."""
    chosen = Chosen(config_of(budget_tokens=budget, estimate_clusters=own), device, head_dim=32)
    assert (grids.own_shortlist(64, own, budget) > 0) == (budget < 100)
    w, scores = chosen.decoder.workspace, chosen.scores
    if levels is not None:
        for b, clusters in enumerate(n * 2 for n in chosen.step.page_count.tolist()):
            mass = of_request(w, w.estimate_mass, b, clusters)
            mass[:] = (mass * 1e3).floor().clamp(max=levels - 1) * 0.125
            short = largest(mass * scores.size[b, :, :clusters], own + budget)
            w.shortlist[b, :, : short.shape[1]] = short.int()
    value = torch.rand(chosen.candidates.position.shape, generator=torch.Generator().manual_seed(own)).to(device)
    chosen.fill_values(value)
    chosen.decoder.recall(0)
    chosen.assert_recalled(recall(value, scores, chosen.candidates, budget))
    for (b, h), clusters in ((key, int(chosen.step.page_count[key[0]]) * 2) for key in chosen.order):
        low, high, last = w.own_edge[b, h].tolist()
        left = of_request(w, w.left, b, clusters)[h]
        bits = (of_request(w, w.estimate_mass, b, clusters)[h] * left).view(torch.int32)
        place = torch.arange(clusters, device=device)
        listed = (bits >= high) | ((bits >= low) & (place <= last))
        assert place[listed].tolist() == w.own[b, h].tolist()[: int(listed.sum())], "the edge is of another list"
        assert int(listed.sum()) == min(own, clusters)


def test_slots_need_64_bits(device: str) -> None:
    chosen = Chosen(config_of(), device, head_dim=32, kv_heads=1)
    far = 1 << 28  # pages of 16: slots beyond 2^32
    value = torch.rand(chosen.candidates.position.shape, generator=torch.Generator().manual_seed(0)).to(device)
    chosen.fill_values(value)
    step = chosen.step._replace(pages=chosen.step.pages + far)
    recall_triton(chosen.index, step, chosen.decoder.limit, chosen.decoder.workspace)
    chosen.assert_recalled(recall(value, chosen.scores, chosen.candidates, 48), far * 16)


def test_whole_clusters_are_recalled_where_nothing_is_refined(device: str) -> None:
    chosen = Chosen(config_of(refine=False), device, head_dim=32)
    chosen.decoder.refine(0, SCALE, torch.float32)
    assert chosen.decoder.workspace.value.isnan().all(), "there are no codes to refine by"
    chosen.decoder.recall(0)
    chosen.assert_recalled(recall_all(chosen.scores, chosen.candidates))
