"""The shipped engine is docs/design.md "Exactly": every stage against the float64 oracle (exactly.py), fed the shipped
output of the stage before, then a whole step; on random keys, on a real model's, and on degenerate ones.

Float32 may differ from float64 by its rounding alone. So an integer, a label or a choice may be another one only where
the two values agree within 1e-5 relative (or within the rounding of logits, where these are large).

Red when: a formula, a start, a tie or a rounding of the engine is not that document's; a kernel reads a row, segment, head or
slot that is not the request's (everything else in the pool and the index is NaN here); a degenerate input gives NaN.
"""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import encode, kmeans, movement
from sglang_clusterkv.kernels.attend.reference import attend
from sglang_clusterkv.kernels.decode import cpu, reference
from sglang_clusterkv.kernels.encode import reference as encode_reference
from sglang_clusterkv.kernels.estimate.reference import estimate
from sglang_clusterkv.kernels.kmeans import reference as kmeans_reference
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.kernels.merge.reference import merge
from sglang_clusterkv.kernels.movement import reference as movement_reference
from sglang_clusterkv.kernels.refine.reference import candidate_logits, candidate_scores, recall_all, refine
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.memory import movement as moved_values
from sglang_clusterkv.memory.codec import RowCodec, rows_at
from sglang_clusterkv.memory.rotation import rotation_signs
from sglang_clusterkv.memory.step import RowBorders, SparseStep
from sglang_clusterkv.tools import demo_model
from tests.support import exactly as ex
from tests.support.captured import Captured, capture
from tests.support.scenes import PAGE, Scene

MODEL = demo_model.default_out()  # before a test points the cache elsewhere
AGREE = 1e-5  # relative; values this close are equal to a choice
ROUNDING = 4e-7  # of a float32 sum, in units of the sum of its terms' sizes
OUTPUT = 1e-3  # relative to the largest output
UNDERFLOW = 1e-30  # float32 has no shares of one below

# Compiling the CPU kernels costs seconds per combination: all tests here use this one.
HEAD_DIM, GROUP = 64, 3


def within(stage: str, error: np.ndarray | float, limit: np.ndarray | float) -> None:
    """Every error is at most its limit; NaN is not."""
    assert np.all(error <= limit), f"{stage}: off by {np.max(error)}, allowed {np.max(limit)}"


def rounds_to(stage: str, stored: np.ndarray, x: np.ndarray, tolerance: np.ndarray | float, rounding=ex.bf16) -> None:
    """`stored` is what some number within `tolerance` of x is rounded to."""
    assert np.all((rounding(x - tolerance) <= stored) & (stored <= rounding(x + tolerance))), stage


# ---- a pool, its index, and what they should hold


class Request(NamedTuple):
    """One sequence of T tokens; L layers, H kv heads."""

    keys: torch.Tensor  # [L, T, H, D]
    values: torch.Tensor  # [L, T, H, D]
    segments: list[tuple[int, int]]  # [begin, end) in the sequence; what lies outside is always attended


class Shipped(NamedTuple):
    """One (segment, kv head) as the index holds it."""

    stored: ex.StoredSegment
    key_rows: tuple[torch.Tensor, torch.Tensor | None]  # packed uint8 [C, packed_bytes], scales bf16 [C, scales]
    value_rows: tuple[torch.Tensor, torch.Tensor | None]
    codes: np.ndarray  # [M, D] by token, as the oracle's: bit 0 negative, bit 1 outer
    code_scale: np.ndarray  # [M] by token
    movement: tuple[torch.Tensor, torch.Tensor]  # rows that meet the query and that are added [R, D]


class Placed:
    """Requests placed in scattered pages of a pool, their segments built, and the lists of one step. All else is NaN.

    Args:
        config: of the engine.
        requests: every one has at least one segment; with `by_engine`, segments are ignored and the engine plans them.
        dtype: of the pool.
    """

    def __init__(
        self, config: ClusterKVConfig, requests: list[Request], dtype=torch.float32, *, by_engine: bool = False
    ) -> None:
        layers, _, kv_heads, head_dim = requests[0].keys.shape
        pages = sum(-(-r.keys.shape[1] // PAGE) for r in requests) + 9
        self.config, self.requests = config, requests
        self.scene = Scene(
            config, layers=layers, kv_heads=kv_heads, head_dim=head_dim, pages=pages, dtype=dtype, context=2048
        )
        self.index = self.scene.index
        self._read: dict[tuple[object, ...], Shipped] = {}
        self.scale = head_dim**-0.5
        self.options = ex.Options(**{name: getattr(config, name) for name in ex.Options._fields})
        self.rotation = ex.hadamard_rotation(head_dim, rotation_signs(head_dim).numpy())
        for buffer in (*self.scene.keys, *self.scene.values):
            buffer[:PAGE] = 0  # padding of every list
            buffer[PAGE:] = torch.nan
        for name, array in self.index.arrays.items():
            if name != "page_state":
                array[:, array.shape[1] // pages :].view(torch.uint8).fill_(255)
        self.lengths = [r.keys.shape[1] for r in requests]
        self.segments = [r.segments for r in requests]
        if by_engine:
            self.step = self._step_by_engine()
        else:
            self._build_by_hand()
            self.step = self.step_over(list(range(len(requests))))

    def _place(self, row: int, request: Request, tokens: slice) -> None:
        slots = self.scene.slots(row, request.keys.shape[1])[tokens]
        for layer in range(len(self.scene.keys)):
            self.scene.keys[layer][slots] = request.keys[layer, tokens].to(self.scene.keys[layer].dtype)
            self.scene.values[layer][slots] = request.values[layer, tokens].to(self.scene.keys[layer].dtype)

    def _build_by_hand(self) -> None:
        for row, (request, length) in enumerate(zip(self.requests, self.lengths, strict=True)):
            self.scene.write(row, 0, length)
            self._place(row, request, slice(None))
            for s, (first, last) in enumerate(request.segments):
                slots = self.scene.slots(row, length)[first:last]
                build.build_segments(self.index, [100 * row + s], [slots], self.scene.keys, self.scene.values)

    def step_over(self, rows: list[int]) -> SparseStep:
        """The lists of a step of these requests."""
        most = max(len(self.segments[row]) for row in rows)
        begin, end = np.full((2, len(rows), most), np.iinfo(np.int32).max, np.int32)
        covered = np.zeros((len(rows), most + 1), np.int32)
        for i, row in enumerate(rows):
            count = len(self.segments[row])
            begin[i, :count], end[i, :count] = np.transpose(self.segments[row])
            covered[i, 1 : count + 1] = np.cumsum(end[i, :count] - begin[i, :count])
        counts, lengths = np.array([len(self.segments[row]) for row in rows]), np.array(self.lengths)[rows]
        borders = RowBorders(np.array(rows), lengths, counts, begin, end, covered)
        return sparse_step(borders, self.scene.req_to_token, PAGE)

    def _step_by_engine(self) -> SparseStep:
        for row, (request, length) in enumerate(zip(self.requests, self.lengths, strict=True)):
            self.scene.prefill(row, length - 1)
            self._place(row, request, slice(0, length - 1))
        rows = list(range(len(self.requests)))
        step = self.scene.decode(rows, self.lengths)
        assert step.sparse is not None and step.dense is None, "the requests must decode sparsely"
        tables = self.scene.engine.tables
        for row, (request, length) in enumerate(zip(self.requests, self.lengths, strict=True)):
            self._place(row, request, slice(length - 1, length))
            count = int(tables.recallable(np.array([row]), np.array([length]))[0])
            borders = zip(tables.begin[row, :count].tolist(), tables.end[row, :count].tolist(), strict=True)
            self.segments[row] = list(borders)
        return step.sparse

    def heads(self) -> itertools.product:
        """Every (request, layer, kv head)."""
        g = self.index.geometry
        return itertools.product(range(len(self.requests)), range(g.layers), range(g.kv_heads))

    def recallable(self, row: int) -> np.ndarray:
        """Positions of a request's clustered tokens: what its list of recallable tokens holds."""
        return np.concatenate([np.arange(begin, end) for begin, end in self.segments[row]])

    def list_begins(self, row: int) -> np.ndarray:
        """Where each segment begins in that list."""
        return np.cumsum([0] + [end - begin for begin, end in self.segments[row]])[:-1]

    def clusters(self, row: int) -> int:
        """Clusters of a request, empty ones included."""
        return len(self.recallable(row)) // self.config.tokens_per_cluster

    def positions(self, row: int, slots: torch.Tensor) -> np.ndarray:
        """Positions of a request's slots."""
        position = np.full(self.index.geometry.slots, -1)
        position[self.scene.slots(row, self.lengths[row])] = np.arange(self.lengths[row])
        found = position[slots.numpy()]
        assert found.min(initial=0) >= 0, "a slot that is not the request's"
        return found

    def pool(self, row: int, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [T, D] of a request as the pool holds them."""
        slots = self.scene.slots(row, self.lengths[row])
        return tuple(ex.f64(b[layer][slots, head].float().numpy()) for b in (self.scene.keys, self.scene.values))

    def read(self, row: int, segment: tuple[int, int], layer: int, head: int) -> Shipped:
        """A segment from the arrays of the index, looked at once."""
        place = (row, segment, layer, head)
        if place in self._read:
            return self._read[place]
        view, (begin, end) = self.index.layer(layer), segment
        slots = self.scene.slots(row, end)[begin:]
        pages = slots[::PAGE] // PAGE
        rows = self.index.cluster_rows(pages).flatten()
        size = np.diff(view.cluster_end[rows, head].numpy().astype(np.int64), prepend=0)
        order = view.members[slots, head].numpy().astype(np.int64)
        assert size.min() >= 0 and size.sum() == end - begin, size
        np.testing.assert_array_equal(np.sort(order), np.arange(end - begin))
        members = np.split(order, np.cumsum(size)[:-1])
        labels = np.empty_like(order)
        labels[order] = np.repeat(np.arange(len(size)), size)

        quarters = view.segment_vectors[pages[:4], head].double().numpy()  # [4, 3, D/4]
        mean_key, mean_value, variance = quarters.transpose(1, 0, 2).reshape(3, -1)
        key_rows = rows_at(view.key_rows, view.key_scales, (rows, head))
        value_rows = rows_at(view.value_rows, view.value_scales, (rows, head))
        behind = pages[4 : 4 + ex.movement_rank(end - begin, PAGE)]
        meets, adds = moved_values.unpack(view.segment_vectors[behind, head])
        levels, code_scale = np.ones((len(order), len(mean_key))), np.zeros(len(order))
        if view.codes is not None and view.code_scales is not None:
            # The i-th code belongs to the i-th entry of the member list.
            codes, scales = view.codes[slots, head], view.code_scales[slots, head]
            levels[order] = self.index.token_codec.decode(codes, torch.ones_like(scales)).numpy()
            code_scale[order] = scales.double().numpy()
        token_codes = (levels < 0) + 2 * (np.abs(levels) > 1)
        stored = ex.StoredSegment(
            labels=labels,
            members=members,
            size=size,
            centroid=mean_key + self.index.row_codec.decode(*key_rows).double().numpy(),
            mean_value=self.index.row_codec.decode(*value_rows).double().numpy(),
            spread=view.spread[rows, head].double().numpy(),
            mean_key=mean_key,
            segment_mean_value=mean_value,
            variance=variance,
            y=levels * code_scale[:, None],
            movement=(adds.double().T @ meets.double()).numpy() if self.index.keeps_movement else None,
        )
        self._read[place] = Shipped(stored, key_rows, value_rows, token_codes, code_scale, (meets, adds))
        return self._read[place]


# ---- build


def check_build(placed: Placed, clear: float = 0.0) -> list[Shipped]:
    """Every stage of every (segment, layer, kv head); returns what was read.

    `clear`: the share of them, at least, in which it is clear which keys are outliers.
    """
    read, are_clear = [], []
    for row, layer, head in placed.heads():
        keys, values = placed.pool(row, layer, head)
        for begin, end in placed.segments[row]:
            shipped = placed.read(row, (begin, end), layer, head)
            are_clear.append(check_labels(placed.config, keys[begin:end], shipped.stored.labels))
            check_statistics(placed.index.row_codec, keys[begin:end], values[begin:end], shipped)
            if placed.config.refine:
                check_codes(placed.config.code_bits, keys[begin:end], placed.rotation, shipped)
            if placed.index.keeps_movement:
                check_movement(keys[begin:end], values[begin:end], placed.rotation, shipped)
            read.append(shipped)
    assert np.mean(are_clear) >= clear, are_clear
    return read


def check_labels(config: ClusterKVConfig, keys: np.ndarray, stored: np.ndarray) -> bool:
    """Each pass from the shipped labels of the pass before; `stored` is the last.

    Where keys are about equally far from their centroids, it is open which of them are the outliers: then the last pass is
    left out, and the result is false.
    """
    clear = True
    clusters, passes = len(keys) // config.tokens_per_cluster, config.kmeans_passes
    outliers = int(clusters * config.outlier_share)
    narrow = torch.from_numpy(keys).float().unsqueeze(0)
    narrow -= narrow.mean(1, keepdim=True)
    exact = keys - keys.mean(0)
    for labels_of in (kmeans.labels_of, kmeans_reference.labels_of):
        seen = centroids = ex.start_centroids(exact, clusters)
        labels = np.zeros(len(keys), np.int64)
        for done in range(1, passes + 1):
            last = done == passes
            if last and passes > 1:
                centroids, margin = ex.give_to_outliers(exact, labels, seen, centroids, outliers)
                if margin < AGREE:
                    clear = False
                    continue
            labels = labels_of(narrow, clusters, done, outliers if last else 0)[0].numpy()
            scores = ex.assignment_scores(exact, centroids)
            within("labels", ex.assignment_slack(scores, labels), AGREE)
            if last:
                within("stored labels", ex.assignment_slack(scores, stored), AGREE)
            seen, centroids = centroids, ex.update_centroids(exact, labels, centroids)
    return clear


def check_statistics(codec: RowCodec, keys: np.ndarray, values: np.ndarray, shipped: Shipped) -> None:
    """Sizes, member lists, segment vectors, spread and rows, from the shipped labels."""
    stored = shipped.stored
    expected = ex.cluster_statistics(keys, values, stored.labels, len(stored.size))
    np.testing.assert_array_equal(stored.size, expected.size)
    np.testing.assert_array_equal(np.concatenate(stored.members), np.concatenate(expected.members))
    key_size, value_size = np.abs(keys).max(), np.abs(values).max()
    rounds_to("mean key", stored.mean_key, expected.segment_mean_key, ROUNDING * key_size)
    rounds_to("mean value", stored.segment_mean_value, expected.segment_mean_value, ROUNDING * value_size)

    variance = expected.segment_variance
    nothing = (ROUNDING * key_size) ** 2  # what the rounding of a mean makes of a variance of zero
    rounds_to("variance", stored.variance, variance, AGREE * variance + nothing)
    # The spread is a ratio to the variance: without any, it is of noise, and counts nothing.
    noise = min(1.0, nothing * len(variance) / max(variance.sum(), nothing)) if nothing else 0.0
    rounds_to("spread", stored.spread, expected.spread, AGREE * expected.spread + noise * len(keys))

    alive = stored.size > 0
    centered = np.abs(keys - keys.mean(0)).max()
    key_rows, value_rows = (rows_at(*rows, alive) for rows in (shipped.key_rows, shipped.value_rows))
    check_rows("centroid", codec, *key_rows, (expected.centroid - stored.mean_key)[alive], centered)
    check_rows("mean value", codec, *value_rows, expected.mean_value[alive], value_size)
    assert np.isfinite(stored.centroid).all() and np.isfinite(stored.mean_value).all()


def check_rows(
    stage: str, codec: RowCodec, packed: torch.Tensor, scales: torch.Tensor | None, x: np.ndarray, size: float
) -> None:
    """Rows hold x [C, D], means of numbers up to `size`: scales, then integers by these scales."""
    decoded = codec.decode(packed, scales).double().numpy()
    tolerance = AGREE / 7 * np.abs(x).max(1, keepdims=True) + ROUNDING * size
    assert (scales is None) == (codec.name == "bf16")
    if scales is None:
        return rounds_to(f"{stage}: bf16", decoded, x, tolerance)
    top = {"int4": 7, "int8": 127}[codec.name]
    scale = scales.double().numpy()
    group = x.shape[1] // codec.scales
    largest = np.abs(x).reshape(len(x), -1, group).max(2)
    rounds_to(f"{stage}: scale", scale, largest / top, tolerance / top)
    scale = np.repeat(scale, group, axis=1)

    def integers(x: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)), -top - 1, top)

    rounds_to(f"{stage}: {codec.name}", integers(decoded), x, tolerance, integers)


def check_codes(bits: int, keys: np.ndarray, rotation: np.ndarray, shipped: Shipped) -> None:
    """Levels of the codes from the shipped centroids, scales from the shipped levels."""
    residuals = (keys - shipped.stored.centroid[shipped.stored.labels]) @ rotation.T
    least_squares = []
    for y, codes in zip(residuals, shipped.codes, strict=True):
        differ = codes != ex.encode_code(y, bits).codes
        assert not differ.any() or not np.any(differ & ~ex.code_is_close(y, bits, AGREE)), "code levels"
        least_squares.append(ex.code_scale(y, ex.code_levels(codes, bits)))
    rounds_to("code scale", shipped.code_scale, np.array(least_squares), AGREE * np.array(least_squares))


def check_movement(keys: np.ndarray, values: np.ndarray, rotation: np.ndarray, shipped: Shipped) -> None:
    """Both factors, from the shipped labels, within half a level and what float32 makes of the iteration."""
    covariance = ex.covariance(keys, values, shipped.stored.labels)
    rank = len(shipped.movement[0])
    if rank == 0:
        return
    for rows, expected in zip(shipped.movement, ex.movement_factors(covariance, rank, rotation), strict=True):
        largest = np.abs(expected).reshape(rank, -1, ex.group_channels(keys.shape[1])).max(2)
        level = np.repeat(largest / 7, ex.group_channels(keys.shape[1]), axis=1)
        within("movement", np.abs(rows.double().numpy() - expected), 0.55 * level + AGREE * np.abs(expected).max())


# ---- decode


class Stages(NamedTuple):
    """What one (request, kv head) got from the stages; C clusters, N candidates. Positions are in the sequence."""

    size: np.ndarray  # [C]
    begin: np.ndarray  # [C] in the request's list of recallable tokens
    dot: np.ndarray  # [G, C]
    log_mass: np.ndarray  # [C]
    estimate_mass: np.ndarray  # [C]
    total: np.ndarray  # [G]
    taken: np.ndarray  # [C] members that are candidates
    candidate: np.ndarray  # [N] position
    value: np.ndarray | None  # [N]; None without refine
    recalled: np.ndarray  # positions
    left: np.ndarray  # [C]
    exact: tuple[np.ndarray, np.ndarray]  # output [G, D], log-sum-exp [G]
    estimated: tuple[np.ndarray, np.ndarray] | None
    output: np.ndarray  # [G, D]


def reference_stages(placed: Placed, layer: int, q: torch.Tensor) -> list[list[Stages]]:
    """The torch references, one by one; [B][H]. q [B, H, G, D]."""
    config, index, step = placed.config, placed.index, placed.step
    keys, values = placed.scene.keys[layer], placed.scene.values[layer]
    scores = score(q, keys, index, layer, step, placed.scale)
    limit = config.candidate_tokens if config.refine else config.budget_tokens
    candidates = select(scores, index, layer, step, limit)
    if config.refine:
        value = candidate_scores(
            candidate_logits(q, scores, candidates, index, layer, placed.scale), scores, candidates
        )
        recalled = refine(q, scores, candidates, index, layer, step, placed.scale)
    else:
        recalled = recall_all(scores, candidates)
    exact = attend(q, keys, values, step, recalled.slots, recalled.count, placed.scale)
    estimated = None
    if config.estimate:
        estimated = estimate(scores, recalled.left, index, layer, step, q, placed.scale, recalled.code)
    merged = merge(exact, estimated) if estimated else exact
    chain = reference.sparse_decode(q.flatten(1, 2), keys, values, index, layer, step, placed.scale)
    torch.testing.assert_close(chain, merged.output.flatten(1, 2))

    def of(b: int, h: int) -> Stages:
        clusters, found = placed.clusters(b), int(candidates.count[b, h])
        return Stages(
            size=scores.size[b, h, :clusters].numpy(),
            begin=scores.begin[b, h, :clusters].numpy(),
            dot=scores.dot[b, h, :, :clusters].numpy(),
            log_mass=scores.log_mass[b, h, :clusters].numpy(),
            estimate_mass=scores.estimate_mass[b, h, :clusters].numpy(),
            total=scores.total[b, h].numpy(),
            taken=np.bincount(candidates.cluster[b, h, :found], minlength=clusters),
            candidate=placed.positions(b, candidates.slot[b, h, :found]),
            value=value[b, h, :found].numpy() if config.refine else None,
            recalled=placed.positions(b, recalled.slots[b, h, : int(recalled.count[b, h])]),
            left=recalled.left[b, h, :clusters].numpy(),
            exact=(exact.output[b, h].numpy(), exact.lse[b, h].numpy()),
            estimated=(estimated.output[b, h].numpy(), estimated.lse[b, h].numpy()) if estimated else None,
            output=merged.output[b, h].numpy(),
        )

    return [[of(b, h) for h in range(q.shape[1])] for b in range(q.shape[0])]


def cpu_stages(placed: Placed, layer: int, q: torch.Tensor) -> list[list[Stages]]:
    """The CPU kernels, one by one; [B][H]."""
    keys, values = placed.scene.keys[layer], placed.scene.values[layer]
    rows, key_rows, value_rows = q.contiguous().numpy(), keys.numpy(), values.numpy()
    decoder = cpu.CpuDecoder(placed.index, q.shape[2], torch.float32)
    decoder.prepare(placed.step, *q.shape[1:])
    decoder.score(rows, key_rows, layer, placed.scale)
    decoder.select()
    u, output = decoder.buffers, np.empty_like(rows)
    taken = u.taken.copy()
    if placed.config.refine:
        decoder.rotate(rows)
        decoder.refine(layer, placed.scale)
        decoder.recall()
    else:
        decoder.recall_all(layer)
    decoder.attend(rows, key_rows, value_rows, placed.scale, output)
    exact, exact_lse = output.copy(), u.lse.copy()
    if placed.config.estimate:
        decoder.estimate(rows, layer, placed.scale)
        decoder.merge(output)
    chain = cpu.sparse_decode(q.flatten(1, 2), keys, values, placed.index, layer, placed.step, placed.scale)
    torch.testing.assert_close(chain, torch.from_numpy(output).flatten(1, 2))

    def of(b: int, h: int) -> Stages:
        clusters, found = placed.clusters(b), int(u.candidates[b, h])
        # As its estimate has them: from the exponentials that score keeps.
        masses = u.weight[b, h, :, :clusters] * np.exp(u.peak[b, h] - u.total[b, h])[:, None]
        recalled = placed.positions(b, torch.from_numpy(u.recalled[b, h, : u.recalled_count[b, h]]))
        refined = placed.config.refine
        return Stages(
            size=u.size[b, h, :clusters],
            begin=u.begin[b, h, :clusters],
            dot=u.dot[b, h, :, :clusters],
            log_mass=u.log_mass[b, h, :clusters],
            estimate_mass=masses.mean(0) / np.maximum(u.size[b, h, :clusters], 1),
            total=u.total[b, h],
            taken=taken[b, h, :clusters],
            candidate=placed.recallable(b)[u.place[b, h, :found]] if refined else recalled,
            value=u.value[b, h, :found] if refined else None,
            recalled=recalled,
            left=(u.size - u.taken)[b, h, :clusters],
            exact=(exact[b, h], exact_lse[b, h]),
            estimated=(u.estimate[b, h], u.estimate_lse[b, h]) if placed.config.estimate else None,
            output=output[b, h],
        )

    return [[of(b, h) for h in range(q.shape[1])] for b in range(q.shape[0])]


def check_decode(placed: Placed, q: torch.Tensor, stages_of=(reference_stages,)) -> None:
    """Every stage and the whole step of every (request, layer, kv head). q [L, B, H * G, D]."""
    grouped = q.unflatten(2, (placed.index.geometry.kv_heads, -1))
    for shipped_stages in stages_of:
        by_layer = [shipped_stages(placed, layer, grouped[layer]) for layer in range(len(q))]
        for row, layer, head in placed.heads():
            check_step(placed, row, layer, head, ex.f64(grouped[layer, row, head].numpy()), by_layer[layer][row][head])


def check_step(placed: Placed, row: int, layer: int, head: int, q: np.ndarray, s: Stages) -> None:
    """One (request, layer, kv head): each stage from what the shipped stage before gave, then all from the index."""
    options, scale = placed.options, placed.scale
    keys, values = placed.pool(row, layer, head)
    stored = [placed.read(row, segment, layer, head).stored for segment in placed.segments[row]]
    clusters, members, y = ex.request_clusters(placed.segments[row], stored, len(keys))
    recallable = placed.recallable(row)
    base = np.setdiff1d(np.arange(len(keys)), recallable)
    base_logits = ex.exact_logits(q, keys[base], scale)
    cluster_of = np.empty(len(keys), dtype=np.int64)
    for c, positions in enumerate(members):
        cluster_of[positions] = c
    # A logit is a sum of D terms; shares are exponentials of logits, so that its error is their relative error.
    spreads = ex.spread_term(q, scale, clusters)
    rounding = AGREE + ROUNDING * (scale * (np.abs(q) @ np.abs(keys).T).max() + spreads.max())
    value_size = np.abs(values).max()

    # score
    np.testing.assert_array_equal(s.size, clusters.size)
    begins = zip(stored, placed.list_begins(row), strict=True)
    np.testing.assert_array_equal(s.begin, np.concatenate([at + x.size.cumsum() - x.size for x, at in begins]))
    alive = clusters.size > 0
    within("dot", np.abs(s.dot - ex.exact_logits(q, clusters.centroid, scale))[:, alive], rounding)
    choice = ex.choice_logits(q, scale, clusters, options.choice_spread)
    log_mass = ex.choice_log_mass(choice, base_logits, clusters.size)
    within("log of mass", np.abs(s.log_mass[alive] - log_mass[alive]), 2 * rounding)
    np.testing.assert_array_equal(s.log_mass[~alive], -np.inf)
    all_est = ex.estimate_logits(q, scale, clusters, clusters.size, options.estimate_spread)
    within("total", np.abs(s.total - ex.total(all_est, base_logits)), rounding)
    estimate_mass = ex.estimate_mass_per_token(q, scale, clusters, s.total, options.estimate_spread)
    estimate_mass = np.where(alive, estimate_mass, 0.0)
    within("estimate's mass", np.abs(s.estimate_mass - estimate_mass), 2 * rounding * estimate_mass + UNDERFLOW)

    # select
    limit = options.candidate_tokens if options.refine else options.budget_tokens
    chosen = dict(ex.select_candidates(ex.f64(s.log_mass), s.size, limit))
    np.testing.assert_array_equal(s.taken, [chosen.get(c, 0) for c in range(len(s.size))])
    first_members = np.concatenate([members[c][:n] for c, n in enumerate(s.taken)])
    np.testing.assert_array_equal(np.sort(s.candidate), np.sort(first_members))

    # refine and recall
    best = np.arange(len(s.candidate))
    if options.refine:
        of_candidate = cluster_of[s.candidate]
        logits = ex.candidate_logits(q, scale, placed.rotation, clusters.centroid[of_candidate], y[s.candidate])
        value = ex.largest_mass(logits, s.total)
        within("value", np.abs(s.value - value), 2 * rounding * value + UNDERFLOW)
        best = ex.recall(ex.f64(s.value), s.candidate, options.budget_tokens)
    np.testing.assert_array_equal(np.sort(s.recalled), np.sort(s.candidate[best]))
    np.testing.assert_array_equal(s.left, ex.left_sizes(clusters.size, cluster_of[s.recalled]))

    # attend, estimate, merge
    attended = np.concatenate([base, s.recalled])
    exact = ex.softmax_output(ex.exact_logits(q, keys[attended], scale), values[attended])
    check_part("attend", s.exact, exact, rounding, value_size)
    parts, shipped, tied = [exact], [s.exact], 0.0
    if options.estimate:
        est, coded = ex.estimate_logits(q, scale, clusters, s.left, options.estimate_spread), None
        if options.refine and options.estimate_codes:
            rest = ~np.isin(s.candidate, s.recalled)
            coded = np.unique(of_candidate[rest])
            est = ex.estimate_by_codes(
                est, s.left, logits[:, rest], of_candidate[rest], s.total, spreads, options.code_bits
            )
        own = ex.own_value_clusters(s.estimate_mass, s.left, options.estimate_clusters)
        estimated = ex.softmax_output(est, ex.estimate_values(clusters, own))
        weight = ex.movement_weights(clusters, options.estimate_spread, coded)
        moved = ex.moved(q, scale, clusters, est, weight)
        estimated = (estimated[0] + moved, estimated[1])
        value_size = max(value_size, np.abs(moved).max())
        tied = tied_estimates(clusters, est, ex.or_none(s.estimate_mass * s.left), own, rounding)
        # Where all that is left weighs nothing beside the rest, a kernel may have no number for it.
        counts = (estimated[1] > exact[1] + np.log(UNDERFLOW)) | np.isneginf(estimated[1])
        of_heads = [tuple(x[counts] for x in part) for part in (s.estimated, estimated)]
        check_part("estimate", *of_heads, rounding, value_size, tied[counts] if np.ndim(tied) else tied)
        parts, shipped = [exact, estimated], [s.exact, s.estimated]
    within("merge", np.abs(s.output - ex.merge(*zip(*shipped, strict=True))), rounding * value_size)

    # The whole step in float64. Where it chooses otherwise than the engine, the two choices must agree in value.
    whole = ex.decode(q, keys, values, scale, clusters, members, y, placed.rotation, options)
    expected = whole.output
    if not np.array_equal(np.sort(s.recalled), whole.recalled_position):
        within("chosen clusters", best_left_out(log_mass, s.taken > 0, s.taken < s.size), 4 * rounding)
        if options.refine:
            out = ~np.isin(s.candidate, s.recalled)
            with np.errstate(divide="ignore"):
                masses = np.log(ex.or_none(ex.largest_mass(logits, whole.total)))
            within("chosen tokens", best_left_out(masses, ~out, out), 4 * rounding)
        expected = ex.merge(*zip(*parts, strict=True))
    within("output", np.abs(s.output - expected), OUTPUT * np.abs(expected).max() + tied)


Part = tuple[np.ndarray, np.ndarray]


def check_part(stage: str, shipped: Part, expected: Part, rounding: float, value_size: float, tied=0.0) -> None:
    """Output [G, D] and log-sum-exp [G] of a part of the tokens, 0 and -inf where there are none."""
    within(stage, np.abs(shipped[0] - expected[0]), 2 * rounding * value_size + tied)
    some = np.isfinite(expected[1])
    np.testing.assert_array_equal(shipped[1][~some], expected[1][~some])
    within(f"sum of {stage}", np.abs(shipped[1][some] - expected[1][some]), rounding)


def tied_estimates(clusters: ex.Clusters, est: np.ndarray, mass: np.ndarray, own: np.ndarray, rounding: float):
    """[G, D] what it may change that clusters of the same mass as the last of `own` have their own mean value."""
    tied = np.flatnonzero(np.abs(mass - mass[own].min(initial=np.inf)) <= 4 * rounding * mass)
    if np.isin(tied, own).all():
        return 0.0
    weight = np.exp(est - ex.log_sum_exp(est)[:, None])[:, tied]
    return weight @ np.abs(clusters.mean_value - clusters.segment_mean_value[clusters.segment])[tied]


def best_left_out(log_mass: np.ndarray, chosen: np.ndarray, left_out: np.ndarray) -> float:
    """By how much the best that was left out is better than the worst that was chosen."""
    best, worst = log_mass[left_out].max(initial=-np.inf), log_mass[chosen].min(initial=np.inf)
    return best - worst if best > -np.inf else 0.0


# ---- random keys


BOTH = (reference_stages, cpu_stages)


def config_of(**fields: object) -> ClusterKVConfig:
    small = {"budget_tokens": 48, "candidate_tokens": 160, "segment_tokens": 256, "estimate_clusters": 20}
    return ClusterKVConfig(**({"moving_values": "always"} | small | fields))


def loose_groups(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """[L, T, H, D] around 40 centres, with a common offset."""
    layers, tokens, heads, head_dim = shape
    centres = 1.5 * torch.randn(layers, 40, heads, head_dim, generator=generator)
    which = torch.randint(40, (tokens,), generator=generator)
    noise = torch.randn(layers, tokens, heads, head_dim, generator=generator)
    return centres[:, which] + 0.7 * noise + torch.randn(layers, 1, heads, head_dim, generator=generator)


def some_requests(head_dim: int, layers: int = 1, kv_heads: int = 2, seed: int = 0) -> list[Request]:
    """Two requests: three segments with a gap between them, and one short segment behind a longer start."""
    generator = torch.Generator().manual_seed(seed)
    segments = [[(16, 272), (304, 368), (368, 624)], [(48, 240)]]
    return [
        Request(*(loose_groups(generator, layers, tokens, kv_heads, head_dim) for _ in range(2)), borders)
        for tokens, borders in zip((701, 333), segments, strict=True)
    ]


def queries(placed: Placed, group: int, size: float = 1.5) -> torch.Tensor:
    """[L, B, H * G, D]."""
    g = placed.index.geometry
    shape = (g.layers, len(placed.requests), g.kv_heads * group, g.head_dim)
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("head_dim", "group", "centroid_dtype", "code_bits", "dtype"),
    [
        (16, 4, "int8", 1, torch.float32),
        (32, 1, "int4", 2, torch.bfloat16),
        (64, 2, "bf16", 1, torch.float32),
        (80, 3, "int4", 2, torch.float32),
        (96, 2, "int8", 2, torch.float16),
        (128, 4, "int4", 1, torch.bfloat16),
    ],
)
def test_build_and_references_are_exact(head_dim, group, centroid_dtype, code_bits, dtype, monkeypatch) -> None:
    """Here the build is done by the CPU's kernels and by the references; in all other tests by the former."""
    config = config_of(centroid_dtype=centroid_dtype, code_bits=code_bits)
    placed = Placed(config, some_requests(head_dim), dtype)
    check_build(placed, clear=0.5)
    for kernel, definition in (
        (kmeans, kmeans_reference),
        (encode, encode_reference),
        (movement, movement_reference),
    ):
        for name in {"labels_of", "sum_by_label", "within_variance", "token_codes", "factors"} & set(dir(kernel)):
            monkeypatch.setattr(kernel, name, getattr(definition, name))
    placed = Placed(config, some_requests(head_dim, layers=2), dtype)
    check_build(placed, clear=0.5)
    check_decode(placed, queries(placed, group))


OPTIONS = {
    "defaults": {},
    "whole clusters": {"refine": False},
    "no estimate": {"estimate": False},
    "no codes in the estimate": {"estimate_codes": False},
    "whole clusters only": {"refine": False, "estimate": False},
    "all are candidates": {"candidate_tokens": 10_000},
    "all are recalled": {"budget_tokens": 10_000, "candidate_tokens": 10_000},
    "one token": {"budget_tokens": 1, "candidate_tokens": 1},
    "one own mean value": {"estimate_clusters": 1},
    "own mean values": {"estimate_clusters": 10_000},
    "sober": {"choice_spread": 0.0, "estimate_spread": 0.0},
    "optimistic": {"choice_spread": 1.0, "estimate_spread": 2.0},
    "clusters of 4": {"tokens_per_cluster": 4},
    "clusters of 16": {"tokens_per_cluster": 16},
    "one pass": {"kmeans_passes": 1},
    "five passes": {"kmeans_passes": 5},
    "no outliers": {"outlier_share": 0.0},
    "many outliers": {"outlier_share": 0.5},
    "still values": {"moving_values": "never"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_exact(name: str) -> None:
    placed = Placed(config_of(**OPTIONS[name]), some_requests(HEAD_DIM))
    if {"tokens_per_cluster", "kmeans_passes", "outlier_share"} & set(OPTIONS[name]):
        check_build(placed)
    check_decode(placed, queries(placed, GROUP), BOTH)


def check_from_keys(placed: Placed, q: torch.Tensor) -> None:
    """The step's output from nothing but keys, values and queries: the oracle clusters, stores and decodes for itself.

    A label, code or choice at a border may be another one in float32, and then another few tokens are recalled.
    """
    config, grouped = placed.config, q.unflatten(2, (placed.index.geometry.kv_heads, -1))
    by_layer = [reference_stages(placed, layer, grouped[layer]) for layer in range(len(q))]
    same = []
    for row, layer, head in placed.heads():
        stages, heads_q = by_layer[layer][row][head], ex.f64(grouped[layer, row, head].numpy())
        whole = ex.request_output(
            heads_q, *placed.pool(row, layer, head), placed.scale, placed.segments[row], placed.rotation,
            placed.options, config.tokens_per_cluster, config.centroid_dtype, config.code_bits, config.outlier_share, PAGE,
        )  # fmt: skip
        same.append(np.array_equal(np.sort(stages.recalled), whole.recalled_position))
        error = np.abs(stages.output - whole.output).max() / np.abs(whole.output).max()
        within("from keys", error, OUTPUT if same[-1] else 20 * OUTPUT)
    within("requests with other tokens", np.mean(np.logical_not(same)), 0.2)


def test_a_step_is_exact_from_the_keys_on() -> None:
    requests = [some_requests(HEAD_DIM, layers=2, seed=seed)[0] for seed in (2, 3)]
    for fields in ({}, {"refine": False, "centroid_dtype": "int8"}, {"estimate": False, "code_bits": 1}):
        placed = Placed(config_of(**fields), requests)
        check_from_keys(placed, queries(placed, GROUP))


def test_a_longer_request_after_a_shorter_one_finds_room() -> None:
    """The CPU's buffers are kept between steps."""
    placed = Placed(config_of(candidate_tokens=2048), some_requests(HEAD_DIM))
    q, pool = queries(placed, GROUP)[0], (placed.scene.keys[0], placed.scene.values[0])
    for row in (1, 0):
        arguments = (q[row : row + 1], *pool, placed.index, 0, placed.step_over([row]), placed.scale)
        torch.testing.assert_close(cpu.sparse_decode(*arguments), reference.sparse_decode(*arguments))


# ---- degenerate keys, values and queries


def some_keys(seed: int = 5) -> torch.Tensor:
    """[200, 2, HEAD_DIM]."""
    return loose_groups(torch.Generator().manual_seed(seed), 1, 200, 2, HEAD_DIM)[0]


def check_degenerate(
    keys: torch.Tensor, values: torch.Tensor | None = None, q: torch.Tensor | None = None, **fields: object
) -> tuple[list[Shipped], list[Stages]]:
    """Build and decode one request, 128 of its 200 tokens in two segments, with 64 candidates and with all.

    keys and values [200, 2, HEAD_DIM], q [1, 1, 2 * GROUP, HEAD_DIM]. Returns what was built, and the references'
    stages of the two kv heads with 64 candidates.
    """
    values = some_keys(seed=6) if values is None else values
    assert keys.isfinite().all() and values.isfinite().all()
    stages = []
    for candidate_tokens in (64, 10_000):
        small = {"budget_tokens": 24, "candidate_tokens": candidate_tokens, "estimate_clusters": 5}
        placed = Placed(config_of(**(small | fields)), [Request(keys[None], values[None], [(16, 80), (80, 144)])])
        read = check_build(placed)
        q = queries(placed, GROUP) if q is None else q
        check_decode(placed, q, BOTH)
        stages += reference_stages(placed, 0, q[0].unflatten(1, (2, GROUP)))[0]
    assert all(np.isfinite(s.output).all() for s in stages)
    return read, stages[:2]


def test_duplicate_keys_leave_empty_clusters() -> None:
    which = torch.randint(3, (200,), generator=torch.Generator().manual_seed(2))
    read, _ = check_degenerate(some_keys()[which])
    for shipped in read:
        assert np.sum(shipped.stored.size > 0) == 3 and np.sum(shipped.stored.size == 0) == 5
        assert np.all(shipped.stored.variance < 1e-10)


def test_zero_keys_are_one_cluster() -> None:
    read, stages = check_degenerate(torch.zeros(200, 2, HEAD_DIM))
    for shipped in read:
        assert shipped.stored.size.tolist() == [64] + 7 * [0]
        assert not any(x.any() for x in (shipped.stored.centroid, shipped.stored.variance, shipped.stored.spread))
    for s in stages:  # ties everywhere: the lower positions
        assert np.sort(s.recalled).tolist() == list(range(16, 40))


def test_single_member_clusters_have_no_spread() -> None:
    keys = some_keys()
    keys[16:144:16] *= 8  # every second start is far from all others
    read, _ = check_degenerate(keys)
    for shipped in read:
        assert np.all(shipped.stored.size[::2] == 1) and not shipped.stored.spread[::2].any()
    read, _ = check_degenerate(some_keys(), tokens_per_cluster=1)
    for shipped in read:
        assert np.all(shipped.stored.size == 1) and not shipped.stored.spread.any()


def test_a_zero_head_is_zero_and_leaves_the_others_alone() -> None:
    """SGLang on a CPU fills the heads that tensor parallelism lacks with zero weights."""
    keys, values = some_keys(), some_keys(seed=6)
    q = torch.randn(1, 1, 2 * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    _, whole = check_degenerate(keys, values, q)
    keys[:, 1], values[:, 1], q[:, :, GROUP:] = 0, 0, 0
    _, padded = check_degenerate(keys, values, q)
    assert not padded[1].output.any()
    np.testing.assert_allclose(padded[0].output, whole[0].output, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_keys_far_from_zero_lose_nothing(noise: float) -> None:
    offset = 1000 * torch.randn(2, HEAD_DIM, generator=torch.Generator().manual_seed(4))
    check_degenerate(offset + noise * some_keys())


def test_zero_values_give_zero() -> None:
    _, stages = check_degenerate(some_keys(), torch.zeros(200, 2, HEAD_DIM))
    assert not any(s.output.any() for s in stages)


@pytest.mark.parametrize("heads", [slice(None), slice(0, 1)])
def test_a_zero_query_is_exact(heads: slice) -> None:
    q = torch.randn(1, 1, 2 * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    q[:, :, heads] = 0
    _, stages = check_degenerate(some_keys(), None, q)
    if heads == slice(None):  # ties everywhere: the lower clusters, of these the lower positions
        for s in stages:
            assert len(np.unique(s.log_mass[s.size > 0])) == 1 and np.all(s.taken[:3] == s.size[:3])
            np.testing.assert_array_equal(np.sort(s.recalled), np.sort(s.candidate)[:24])


@pytest.mark.parametrize("deviation", [48, 96])
def test_masses_that_no_float_holds_are_ranked_as_in_float64(deviation: int) -> None:
    placed = Placed(config_of(budget_tokens=150), some_requests(HEAD_DIM))
    q = queries(placed, GROUP, 1.0)
    for row, head in itertools.product(range(2), range(2)):
        keys, _ = placed.pool(row, 0, head)
        own = q[0, row, head * GROUP : (head + 1) * GROUP]
        logits = ex.exact_logits(ex.f64(own.numpy()), keys, placed.scale)
        own *= deviation / torch.from_numpy(logits.std(1, keepdims=True)).float()
    for stages_of in BOTH:
        for s in itertools.chain(*stages_of(placed, 0, q[0].unflatten(1, (2, GROUP)))):
            # Below -104 no float32 has an exponential; such clusters are candidates, and tokens of no mass are recalled.
            assert s.log_mass[s.taken > 0].min() < -104 and np.sum(s.value > 0) < len(s.recalled)
    check_decode(placed, q, BOTH)


@pytest.mark.parametrize("size", [1e-3, 10.0, 30.0, 100.0])
def test_flat_and_peaked_attention_is_exact(size: float) -> None:
    q = size * torch.randn(1, 1, 2 * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    check_degenerate(some_keys(), None, q)


def test_nan_keys_stay_in_their_head() -> None:
    keys, values = some_keys(), some_keys(seed=6)
    small = config_of(budget_tokens=24, candidate_tokens=64)
    outputs = []
    for broken in (False, True):
        if broken:
            keys[60, 1] = torch.nan
        placed = Placed(small, [Request(keys[None], values[None], [(16, 80), (80, 144)])])
        for segment in placed.segments[0]:
            placed.read(0, segment, 0, 1)  # its lists are whole
        q = queries(placed, GROUP)[0]
        for decode in (reference, cpu):
            output = decode.sparse_decode(
                q, placed.scene.keys[0], placed.scene.values[0], placed.index, 0, placed.step, placed.scale
            )
            outputs.append(output[:, :GROUP])
    torch.testing.assert_close(outputs[2:], outputs[:2])


# ---- a real model's keys


@pytest.fixture(scope="module")
def captured() -> Captured:
    if not demo_model.is_complete(MODEL):
        assert "CI" not in os.environ, f"no demo model at {MODEL}: `make demo-model` goes before the tests"
        pytest.skip("no demo model: run `make demo-model`")
    return capture(MODEL, layers=(1, 6), tokens=1301)


@pytest.mark.parametrize("segment_tokens", [512, 1024])
def test_a_models_keys_are_exact(captured: Captured, segment_tokens: int) -> None:
    config = config_of(segment_tokens=segment_tokens, budget_tokens=128, candidate_tokens=512, estimate_clusters=64)
    placed = Placed(config, [Request(captured.keys, captured.values, [])], by_engine=True)
    ends = [end for _, end in placed.segments[0]]
    assert ends == [*range(16 + segment_tokens, 1232, segment_tokens), 1232], ends
    assert placed.scale == captured.scale
    check_build(placed)
    for token in (1300, 700):
        check_decode(placed, captured.queries[:, token : token + 1], BOTH)
    check_from_keys(placed, captured.queries[:, 1300:])
