"""The operations of a layer on the CPU as one pass over its pairs (request, kv head).

What requests share comes before: items (shared segment, kv head), over the same threads, whose products the pairs find. A
thread takes a pair through all operations before the next pair, so that what one of them leaves the next finds in a cache.
The operations are functions of their own (`score/cpu.py` and so on); a kernel is compiled once, with all of them in it, and
told which to do: all, in a server, or one, for whoever looks at what each leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sglang_clusterkv.kernels.attend.cpu import attend_pair, expect_pair
from sglang_clusterkv.kernels.codes_cpu import PIECES
from sglang_clusterkv.kernels.cpu_math import njit
from sglang_clusterkv.kernels.estimate.cpu import estimate_pair
from sglang_clusterkv.kernels.levels_cpu import BLOCK, DIGITS
from sglang_clusterkv.kernels.merge.cpu import merge_pair
from sglang_clusterkv.kernels.refine.cpu import list_pair, recall_all_pair, recall_pair, rotate_pair, value_pair
from sglang_clusterkv.kernels.score.cpu import score_pair, shared_pair
from sglang_clusterkv.kernels.score.products_cpu import UNPACKED, products_of
from sglang_clusterkv.kernels.select.cpu import select_pair
from sglang_clusterkv.kernels.threads_cpu import cached, done, leave, take, wait
from sglang_clusterkv.kernels.threshold_cpu import BINS
from sglang_clusterkv.kernels.trace.cpu import look_pair
from sglang_clusterkv.kernels.vectors_cpu import TOGETHER
from sglang_clusterkv.memory.codec import SLICES
from sglang_clusterkv.memory.tier import Reads

if TYPE_CHECKING:  # what `cached` gives the kernel

    def given(*args: Any) -> None: ...

    split = shared = score = select = listed = rotate = refine = recall = recall_all = expect = attend = given
    estimate = merge = look = given

SCORE, SELECT, ROTATE, REFINE, RECALL, RECALL_ALL, ATTEND, ESTIMATE, MERGE, LOOK = (1 << i for i in range(10))


class Numbers(NamedTuple):
    """What the kernel knows as numbers."""

    scale: np.float32
    choice_spread: np.float32
    estimate_spread: np.float32
    page_size: int
    per_page: int  # clusters
    limit: int  # candidates
    budget: int  # recalled tokens
    own: int  # clusters that are estimated by their own mean value
    moves: bool  # mean values move with the query
    moved: np.float32  # how far, of clusters without candidates that codes tell of
    by_code: bool  # candidates that were not recalled are estimated by their codes
    pairs_at_once: int  # that a thread takes, of which neighbours lie in the same lines of memory


class Lists(NamedTuple):
    """`memory.step.SparseStep`, as arrays."""

    pages: np.ndarray
    rows: np.ndarray  # int64 [B, C + 2 BLOCK]: cluster rows of the pages, then some of them again
    page_count: np.ndarray
    segment_begin: np.ndarray
    segment_count: np.ndarray
    base_slots: np.ndarray
    base_count: np.ndarray
    shared_first: np.ndarray  # `memory.sharing.SharedSegments`, as are the following
    shared_request: np.ndarray
    shared_ordinal: np.ndarray
    is_shared: np.ndarray


class Buffers(NamedTuple):
    """What the operations of one layer hand to each other; B, H, G, D as in the references. S segments, C clusters, W tokens
    that are always attended, K candidates, R recalled tokens: as many as the step has, rounded up, whatever is configured."""

    size: np.ndarray  # int32 [B, H, C]
    begin: np.ndarray  # int32 [B, H, C]
    spread: np.ndarray  # float32 [B, H, C]
    taken: np.ndarray  # int32 [B, H, C]: members that are candidates, then tokens recalled
    log_mass: np.ndarray  # float32 [B, H, C]
    dot: np.ndarray  # float32 [B, H, G, C]
    weight: np.ndarray  # float32 [B, H, G, C]
    variances: np.ndarray  # float32 [B, H, S, G]
    base_logit: np.ndarray  # float32 [B, H, G, W]
    peak: np.ndarray  # float32 [B, H, G]
    total: np.ndarray  # float32 [B, H, G]
    candidates: np.ndarray  # int32 [B, H]
    rotated: np.ndarray  # float32 [B, H, G, D]
    value: np.ndarray  # float32 [B, H, K]
    entry: np.ndarray  # int64 [B, H, K + BLOCK]: slots of the candidates' codes
    place: np.ndarray  # int32 [B, H, K]
    of_cluster: np.ndarray  # int32 [B, H, K]
    by_code: np.ndarray  # float32 [B, H, G, K + BLOCK]
    rest: np.ndarray  # float32 [B, H, K]
    recalled: np.ndarray  # int64 [B, H, R]
    recalled_count: np.ndarray  # int32 [B, H]
    lse: np.ndarray  # float32 [B, H, G]: of what was read, then of all tokens
    exact_lse: np.ndarray  # float32 [B, H, G]: of what was read
    estimate: np.ndarray  # float32 [B, H, G, D]
    estimate_lse: np.ndarray  # float32 [B, H, G]
    reads: np.ndarray  # int64 [B, H, len(Reads)]: rows read, with a host tier
    # int8 [B, H, G, DIGITS, D]: queries as score multiplies them, as are the next two (levels_cpu.py)
    digits: np.ndarray
    digit_start: np.ndarray  # int32 [B, H, G, SLICES]
    digit_unit: np.ndarray  # float32 [B, H, G]


def make_buffers(
    batch: int,
    heads: int,
    group: int,
    channels: int,
    segments: int,
    clusters: int,
    base: int,
    candidates: int,
    recalled: int,
) -> Buffers:
    """Allocate the buffers of a step."""
    by_head, by_query = (batch, heads), (batch, heads, group)

    def floats(*shape: int) -> np.ndarray:
        return np.empty(shape, np.float32)

    def ints(*shape: int) -> np.ndarray:
        return np.empty(shape, np.int32)

    return Buffers(
        size=ints(*by_head, clusters),
        begin=ints(*by_head, clusters),
        spread=floats(*by_head, clusters),
        taken=ints(*by_head, clusters),
        log_mass=floats(*by_head, clusters),
        dot=floats(*by_query, clusters),
        weight=floats(*by_query, clusters),
        variances=floats(*by_head, segments, group),
        base_logit=floats(*by_query, base + TOGETHER),
        peak=floats(*by_query),
        total=floats(*by_query),
        candidates=ints(*by_head),
        rotated=floats(*by_query, channels),
        value=floats(*by_head, candidates),
        entry=np.empty((*by_head, candidates + BLOCK), np.int64),
        place=ints(*by_head, candidates),
        of_cluster=ints(*by_head, candidates),
        by_code=floats(*by_query, candidates + BLOCK),
        rest=floats(*by_head, candidates),
        recalled=np.empty((*by_head, recalled), np.int64),
        recalled_count=ints(*by_head),
        lse=floats(*by_query),
        exact_lse=floats(*by_query),
        estimate=floats(*by_query, channels),
        estimate_lse=floats(*by_query),
        reads=np.zeros((*by_head, len(Reads._fields)), np.int64),
        digits=np.empty((*by_query, DIGITS, channels), np.int8),
        digit_start=ints(*by_query, SLICES),
        digit_unit=floats(*by_query),
    )


class Scratch(NamedTuple):
    """What an operation needs while it runs, for each of T threads; N slots, L keys."""

    left: np.ndarray  # float32 [T, G, C]
    reach: np.ndarray  # float32 [T, C]
    chance: np.ndarray  # float32 [T, G, C + BLOCK]
    own: np.ndarray  # float32 [T, G, C]
    rows: np.ndarray  # int64 [T, C]
    slots: np.ndarray  # int64 [T, N]
    logits: np.ndarray  # float32 [T, G, N]
    factors: np.ndarray  # float32 [T, N]
    keys: np.ndarray  # uint32 [T, L]
    tied: np.ndarray  # uint32 [T, L]
    near: np.ndarray  # int32 [T, L]
    bins: np.ndarray  # int32 [T, BINS]
    ones: np.ndarray  # int32 [L]
    unpacked: np.ndarray  # float32 [T, UNPACKED + TOGETHER, 1, D]
    order: np.ndarray  # int64 [UNPACKED + TOGETHER], ascending
    vectors: np.ndarray  # float32 [T, G, 2]: a request's queries' products with a segment's vectors
    digits: np.ndarray  # int8 [T, DIGITS, D]
    levels: np.ndarray  # uint8 [T, UNPACKED D]: of unpacked rows, as are the next
    level_scales: np.ndarray  # float32 [T, UNPACKED SLICES]
    # int8 [T, G, DIGITS, D]: rotated queries as refine multiplies them, as are the next three (codes_cpu.py)
    code_digits: np.ndarray
    code_start: np.ndarray  # int32 [T, G, PIECES]
    code_unit: np.ndarray  # float32 [T, G]
    ordered: np.ndarray  # float32 [T, D]


def make_scratch(
    threads: int, group: int, channels: int, clusters: int, base: int, candidates: int, recalled: int
) -> Scratch:
    """Allocate it."""
    listed, keys = max(base + recalled, candidates) + TOGETHER, max(clusters, candidates)
    by_cluster, by_key = (threads, group, clusters), (threads, keys)
    return Scratch(
        left=np.empty(by_cluster, np.float32),
        reach=np.empty((threads, clusters), np.float32),
        chance=np.empty((threads, group, clusters + BLOCK), np.float32),
        own=np.empty(by_cluster, np.float32),
        rows=np.empty((threads, clusters), np.int64),
        slots=np.empty((threads, listed), np.int64),
        logits=np.empty((threads, group, listed), np.float32),
        factors=np.empty((threads, listed), np.float32),
        keys=np.empty(by_key, np.uint32),
        tied=np.empty(by_key, np.uint32),
        near=np.empty(by_key, np.int32),
        bins=np.empty((threads, BINS), np.int32),
        ones=np.ones(keys, np.int32),
        unpacked=np.zeros((threads, UNPACKED + TOGETHER, 1, channels), np.float32),
        order=np.arange(UNPACKED + TOGETHER),
        vectors=np.empty((threads, group, 2), np.float32),
        digits=np.empty((threads, DIGITS, channels), np.int8),
        levels=np.empty((threads, UNPACKED * channels), np.uint8),
        level_scales=np.empty((threads, UNPACKED * SLICES), np.float32),
        code_digits=np.empty((threads, group, DIGITS, channels), np.int8),
        code_start=np.empty((threads, group, PIECES), np.int32),
        code_unit=np.empty((threads, group), np.float32),
        ordered=np.empty((threads, channels), np.float32),
    )


@njit(cache=True)
def cluster_rows(pages: Any, page_count: Any, per_page: Any) -> Any:
    """`Lists.rows` of pages [B, P]; of those behind page_count [B] nobody asks."""
    rows = np.empty((pages.shape[0], pages.shape[1] * per_page + 2 * BLOCK), np.int64)
    for b in range(pages.shape[0]):
        clusters = page_count[b] * per_page
        for p in range(page_count[b]):
            for j in range(per_page):
                rows[b, p * per_page + j] = pages[b, p] * per_page + j
        for c in range(clusters, clusters + 2 * BLOCK):
            rows[b, c] = rows[b, max(clusters - 1, 0)]
    return rows


@functools.cache
def chain_kernel(channels: int, group: int, row_format: int, code_bits: int, pool: int) -> Callable[..., None]:
    """Compile the operations of a layer for one head_dim, group size, row format, code width and pool format.

    `operations` is a sum of those above, which are done in this order for each pair.
    """

    def chain(
        t: Any, counter: Any, takes: Any, operations: Any, q: Any, sinks: Any, signs: Any, keys: Any, values: Any, host: Any,
        index: Any, lists: Any, n: Any, u: Any, scratch: Any, output: Any, row: Any, seen: Any,
    ) -> None:  # fmt: skip
        heads, pairs = q.shape[1], q.shape[0] * q.shape[1]
        items = (len(lists.shared_first) - 1) * heads if operations & SCORE else 0
        if items:
            before = counter[4:]
            pair = take(before)
            while pair < pairs:
                b = pair // heads
                split(b, pair - b * heads, t, q, u, scratch)
                done(before)
                pair = take(before)
            wait(before, pairs)
            before = counter[2:]
            item = take(before)
            while item < items:
                k = item // heads
                shared(k, item - k * heads, t, q, index, lists, n, u, scratch)
                done(before)
                item = take(before)
            wait(before, items)
        taken = take(counter)
        while taken < takes:
            for pair in range(taken * n.pairs_at_once, min(pairs, (taken + 1) * n.pairs_at_once)):
                b = pair // heads
                h = pair - b * heads
                if operations & SCORE:
                    if not items:
                        split(b, h, t, q, u, scratch)
                    score(b, h, t, q, sinks, keys, host, index, lists, n, u, scratch)
                if operations & SELECT:
                    select(b, h, t, lists, n, u, scratch)
                if operations & REFINE:
                    listed(b, h, t, index, lists, n, u, scratch)
                if operations & ROTATE:
                    rotate(b, h, q, signs, u.rotated)
                if operations & REFINE:
                    refine(b, h, t, u.rotated, index, lists, n, u, scratch)
                if operations & RECALL:
                    recall(b, h, t, lists, n, u, scratch)
                if operations & RECALL_ALL:
                    recall_all(b, h, index, lists, n, u)
                if operations & ATTEND:
                    expect(b, h, keys, values, host, lists, u)
                if operations & ESTIMATE:
                    estimate(b, h, t, q, index, lists, n, u, scratch)
                if operations & ATTEND:
                    attend(b, h, t, q, sinks, keys, values, host, lists, n, u, scratch, output)
                if operations & MERGE:
                    merge(b, h, output, u)
                if operations & LOOK:
                    look(b, h, t, row, operations & ESTIMATE, sinks, lists, n, u, scratch, seen)
            done(counter)
            taken = take(counter)
        leave(t, counter, takes)

    return cached(
        chain,
        (channels, group, row_format, code_bits, pool),
        split=products_of(channels, group, row_format).split,
        shared=shared_pair(channels, group, row_format),
        score=score_pair(channels, group, row_format, pool),
        select=select_pair,
        listed=list_pair,
        rotate=rotate_pair(channels, group),
        refine=value_pair(channels, group, code_bits),
        recall=recall_pair,
        recall_all=recall_all_pair,
        expect=expect_pair(channels, pool),
        attend=attend_pair(channels, group, pool),
        estimate=estimate_pair(channels, group, row_format, code_bits),
        merge=merge_pair,
        look=look_pair,
    )
