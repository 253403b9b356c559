"""A decode step whose workspace holds what the torch references give up to a stage, and poison everywhere else.

Every tensor lies between guard bands; floats are NaN and integers a number far out of range until something is written.
"""

from __future__ import annotations

import functools

import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.reference import attend
from sglang_clusterkv.kernels.decode.triton import TritonDecoder
from sglang_clusterkv.kernels.estimate.reference import estimate
from sglang_clusterkv.kernels.merge.reference import Partial
from sglang_clusterkv.kernels.refine.reference import Recalled, recall_all, refine
from sglang_clusterkv.kernels.score.reference import exact_logits, score, segment_vectors
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.kernels.workspace import Workspace
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import PAGE, Scene

SCALE = 0.2
GUARD = 64  # elements on each side of a tensor
FAR = 1 << 30
LENGTHS = (334, 601)  # of the requests, the step's token included


class Guarded:
    """Makes poisoned tensors with guard bands, and checks the bands."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._made: list[tuple[torch.Tensor, int]] = []

    def __call__(self, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor."""
        count = torch.Size(sizes).numel()
        poison = torch.nan if dtype.is_floating_point else FAR
        whole = torch.full((count + 2 * GUARD,), poison, dtype=dtype, device=self._device)
        self._made.append((whole, count))
        return whole[GUARD : GUARD + count].view(sizes)

    def assert_untouched(self) -> None:
        """Nothing was written outside a tensor."""
        for whole, count in self._made:
            bands = torch.cat((whole[:GUARD], whole[GUARD + count :]))
            intact = bands.isnan() if bands.dtype.is_floating_point else bands == FAR
            assert intact.all(), f"{whole.dtype} of {count}: written {int((~intact).sum())} elements outside"


@functools.cache
def scene_of(config: ClusterKVConfig, head_dim: int, dtype: torch.dtype, kv_heads: int) -> tuple[Scene, SparseStep]:
    """Requests of different lengths that decode sparsely; made once. Row 1 is the first one's."""
    scene = Scene(config, layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    for row, length in enumerate(LENGTHS, 1):
        scene.prefill(row, length - 1)
    step = scene.decode([*range(1, len(LENGTHS) + 1)], [*LENGTHS])
    assert step.sparse is not None and step.dense is None, "the scene must decode sparsely"
    return scene, step.sparse


def index_on(index: ClusterIndex, device: str) -> ClusterIndex:
    """The same index on another device."""
    moved = ClusterIndex(index.config, index.geometry, device)
    for name, array in index.arrays.items():
        moved.arrays[name].copy_(array)
    return moved


def step_on(step: SparseStep, device: str) -> SparseStep:
    """The same lists on another device."""
    return SparseStep(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in step))


def of_request(w: Workspace, tensor: torch.Tensor, b: int, clusters: int) -> torch.Tensor:
    """The first clusters of request b in a tensor [..., C] of the workspace: a view."""
    begin = int(w.offset[b])
    return tensor[..., begin : begin + clusters]


def mixed(step: SparseStep, scene: Scene, kinds: str) -> SparseStep:
    """The lists of a batch in which each request of `step` is sparse ("s"), dense ("d") or padding ("-").

    What lies beyond a request's counts is 0, as in all lists; those of pages are as wide as a dense request needs.
    """
    width = max(-(-length // PAGE) for length in LENGTHS)
    pages, segment_of_page = torch.zeros(2, step.batch, width, dtype=torch.int64)
    pages[:, : step.pages.shape[1]], segment_of_page[:, : step.pages.shape[1]] = step.pages, step.segment_of_page
    page_count, base_count, dense_count = step.page_count.clone(), step.base_count.clone(), step.dense_count.clone()
    assert step.lengths is not None
    lengths = step.lengths.copy()
    for b, kind in enumerate(kinds):
        if kind != "s":
            page_count[b] = base_count[b] = 0
            pages[b], lengths[b] = 0, 0
        if kind == "d":
            slots = scene.slots(b + 1, LENGTHS[b])
            pages[b, : -(-LENGTHS[b] // PAGE)] = slots[::PAGE] // PAGE
            dense_count[b] = lengths[b, 0] = LENGTHS[b]
    return step._replace(
        pages=pages,
        segment_of_page=segment_of_page,
        page_count=page_count,
        base_count=base_count,
        dense_count=dense_count,
        lengths=lengths,
    )


class Filled:
    """A step up to the choice of the recalled tokens, by the references, and a decoder whose workspace holds it.

    Args:
        config: of the index.
        device: of everything.
        head_dim, group, dtype, kv_heads: of keys, values and queries.
    """

    def __init__(
        self,
        config: ClusterKVConfig,
        device: str,
        *,
        head_dim: int = 64,
        group: int = 3,
        dtype: torch.dtype = torch.float32,
        kv_heads: int = 2,
    ) -> None:
        scene, step = scene_of(config, head_dim, dtype, kv_heads)
        self.config, self.dtype = config, dtype
        self.index, self.step = index_on(scene.index, device), step_on(step, device)
        self.keys, self.values = scene.keys[0].to(device), scene.values[0].to(device)
        generator = torch.Generator().manual_seed(group)
        rows = torch.randn(step.batch, kv_heads, group, head_dim, generator=generator)
        self.q = rows.to(device, dtype)
        self.wide = self.q.float()
        self.scores = score(self.wide, self.keys, self.index, 0, self.step, SCALE)
        limit = config.candidate_tokens if config.refine else config.budget_tokens
        candidates = select(self.scores, self.index, 0, self.step, limit)
        if config.refine:
            chosen = refine(self.wide, self.scores, candidates, self.index, 0, self.step, SCALE)
        else:
            chosen = recall_all(self.scores, candidates)
        self.guarded = Guarded(device)
        self.decoder = TritonDecoder(self.index, group, self.guarded)
        self.decoder.prepare(self.step)
        self._fill_scores()
        self.recall(chosen)

    def _fill_scores(self) -> None:
        w, s = self.decoder.workspace, self.scores
        batch, heads, group, clusters = s.dot.shape
        for b in range(batch):  # what lies beyond a request's own clusters stays poison
            own = int(self.step.page_count[b]) * self.index.clusters_per_page
            of_request(w, w.dot, b, own)[:] = s.dot[b, :, :, :own]
            rows = self.index.cluster_rows(self.step.pages[b]).flatten()[:own]
            of_request(w, w.estimate_mass, b, own)[:] = s.estimate_mass[b, :, :own]
            of_request(w, w.spread, b, own)[:] = self.index.layer(0).spread[rows].T
            tokens = int(self.step.base_count[b])
            slots = self.step.base_slots[b : b + 1]
            logits = exact_logits(self.wide[b : b + 1], self.keys, slots, self.step.base_count[b : b + 1], SCALE)
            w.base_logit[b, :, :, :tokens] = logits[0, :, :, :tokens]
            segments = int(self.step.segment_count[b])
            variance = segment_vectors(self.index, 0, self.step)[b, :segments, :, 2]
            bonus = 0.5 * SCALE**2 * torch.einsum("hgd,shd->hgs", self.wide[b].square(), variance)
            w.segment_bonus[b, :, :, :segments] = bonus
        w.total[:batch] = s.total

    def recall(self, chosen: Recalled) -> None:
        """Take these tokens as the recalled ones."""
        w = self.decoder.workspace
        self.recalled = chosen
        batch, heads, kept = chosen.slots.shape
        for b in range(batch):
            own = int(self.step.page_count[b]) * self.index.clusters_per_page
            of_request(w, w.left, b, own)[:] = chosen.left[b, :, :own].int()
            self._fill_logits(b, own)
            for h in range(heads):
                count = int(chosen.count[b, h])
                w.recalled[b, h] = FAR
                w.recalled[b, h, :count] = chosen.slots[b, h, :count].flip(0)
        w.recalled_count[:batch] = chosen.count.int()

    def _fill_logits(self, b: int, own: int) -> None:
        """As refine leaves them: by codes where there are candidates that were not recalled, and spreads negative there."""
        w, code = self.decoder.workspace, self.recalled.code
        if code is not None:
            found = code[b, :, :, :own]
            dot, spread = of_request(w, w.dot, b, own), of_request(w, w.spread, b, own)
            dot[:] = torch.where(found == -torch.inf, self.scores.dot[b, :, :, :own], found)
            spread[:] = torch.where(found[:, 0] == -torch.inf, spread.abs(), -spread.abs())

    def exact(self) -> Partial:
        """What attend should give."""
        return attend(
            self.wide, self.keys, self.values, self.step, self.recalled.slots, self.recalled.count, SCALE
        )  # fmt: skip

    def estimated(self) -> Partial:
        """What the estimate should give."""
        return estimate(self.scores, self.recalled.left, self.index, 0, self.step, self.wide, SCALE, self.recalled.code)


def merged(output: torch.Tensor, lse: torch.Tensor) -> Partial:
    """Parts output [B, H, P, G, D], lse [B, H, P, G] as one, in float64."""
    whole = lse.double().logsumexp(2)
    weight = (lse.double() - torch.where(whole.isfinite(), whole, 0.0).unsqueeze(2)).exp()
    return Partial((output.double() * weight.unsqueeze(-1)).sum(2), whole)


def assert_close(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within float32's error; on a GPU, where products are made in the pool's type, within that of `dtype`."""
    loose = dtype is not torch.float32 and result.device.type != "cpu"
    tolerance = 2e-2 if loose else 2e-5
    torch.testing.assert_close(result.float(), expected.float(), atol=tolerance, rtol=tolerance)
