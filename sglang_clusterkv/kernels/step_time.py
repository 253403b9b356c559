"""The time that a decode step needs on an H200, from bytes and from instructions: the least, and what is likely.

A launch needs its bytes (`step_model.py`) at nine tenths of the memory's bandwidth, or its instructions, whichever takes
longer, and a gap before it. Instructions are those of machine code (`instruction_counts.py`) times how often a step's lists
let them run. The floor is four of them per cycle and SM, which no code exceeds. Likely is what kernels of this kind reach: .16
per cycle and resident warp, 2.2 at most; this may be wrong by half either way, until a GPU has run them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.instruction_counts import PIECES
from sglang_clusterkv.kernels.step_model import (
    JOINED,
    SMS,
    dense_launches,
    lists_of,
    parts_of,
    short_of,
    sparse_launches,
)
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS
from sglang_clusterkv.memory import movement

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.kernels.step_model import Launch, Lists, StepShape

CYCLES_PER_US = 1800
BYTES_PER_US = 4.3e6  # an H200's 4.8 TB/s, less a tenth
GAP_US = 1.2  # before a launch, in a captured graph
FLOOR_PER_CYCLE = 4.0
LIKELY_PER_CYCLE, LIKELY_PER_WARP = 2.2, 0.16
HALVINGS = 13  # of a bracket, of masses as models have them
LONGEST_RUN = 3  # eights of candidates, of the longest cluster of those that the choice takes at a time
OTHER_MS = 4.7  # of a step of Llama-3.1-8B: weights, and all that is not attention


class Work(NamedTuple):
    """What one launch executes.

    Attributes:
        instructions: of all warps of all programs.
        warps: of a program.
        resident: programs that fit an SM.
    """

    instructions: float
    warps: int
    resident: int

    def floor_us(self) -> float:
        """Four instructions per cycle and SM."""
        return self.instructions / SMS / FLOOR_PER_CYCLE / CYCLES_PER_US

    def likely_us(self, programs: int) -> float:
        """With as many warps as are resident; programs that do not fill the SMs, or fill them once more, take as long as if."""
        resident = min(self.resident, -(-programs // SMS))
        rounds = programs / (SMS * resident)
        rounds = max(1.0, float(math.ceil(rounds)) if rounds <= 3 else rounds)
        per_cycle = min(LIKELY_PER_CYCLE, LIKELY_PER_WARP * self.warps * resident)
        return rounds * resident * self.instructions / programs / per_cycle / CYCLES_PER_US


class Time(NamedTuple):
    """Microseconds of one launch, or of all of a layer."""

    floor: float
    likely: float


class MixedWork(NamedTuple):
    """What a launch of programs of several kinds executes.

    Attributes:
        programs: instructions of all warps of each program, in the order in which they start.
        warps: of a program.
        resident: programs that fit an SM.
    """

    programs: Sequence[float]
    warps: int
    resident: int

    def floor_us(self) -> float:
        """Four instructions per cycle and SM; and no program is faster than its warps, one each."""
        return max(sum(self.programs) / SMS / FLOOR_PER_CYCLE, max(self.programs) / self.warps) / CYCLES_PER_US

    def likely_us(self, programs: int) -> float:
        """Each program starts where one ends first; so many run on an SM all the time."""
        assert programs == len(self.programs), (programs, len(self.programs))
        resident = min(self.resident, -(-programs // SMS))
        per_cycle = min(LIKELY_PER_CYCLE, LIKELY_PER_WARP * self.warps * resident) / resident
        places = [0.0] * (SMS * resident)
        for instructions in self.programs:
            heapq.heapreplace(places, places[0] + instructions)
        return max(places) / per_cycle / CYCLES_PER_US


def _joined(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> MixedWork:
    """Attend and the estimate, in the order of their programs."""
    parts, scaled = parts_of(shape, config, lists), shape.head_dim / 128
    moving = ", moving" if movement.moves(config) else ""
    rest, own, base, recalled = (
        PIECES[f"attend and estimate, a tile of {kind}{moving}"]
        for kind in ("the rest", "own values", "the base", "recalled tokens")
    )
    tiles = [
        ("the rest", [rest] * -(-lists.clusters // 256), parts.rest),
        ("own values", [own] * -(-min(config.estimate_clusters, lists.clusters) // 32), parts.own),
        ("tokens", [base] * -(-lists.base // 64) + [recalled] * -(-lists.recalled // 64), parts.splits),
    ]
    found: list[float] = []
    for kind, work, programs in tiles:
        share = -(-len(work) // max(1, programs))
        for program in range(programs):
            of = PIECES[f"attend and estimate, a program of {kind}{moving}"] + sum(
                work[program * share : (program + 1) * share]
            )
            found += [4 * scaled * of] * shape.pairs
    return MixedWork(found, 4, 2 if moving else 3)


def work_of(shape: StepShape, config: ClusterKVConfig) -> dict[str, Work | MixedWork]:
    """What the launches of one layer execute, by name. Counted at head_dim 128; other sizes are taken as proportional."""
    lists, pairs = lists_of(shape, config), shape.pairs
    large = ", large" if lists.clusters > 4096 else ""
    tiles = 64 if large else 16
    score = _score(shape, config, lists)
    shares = grids.mass_parts(pairs, lists.clusters)
    masses = (
        PIECES[f"masses, a program{large}"] * shares
        + PIECES[f"masses, tiles of log-sum-exps{large}"] * shares * -(-lists.clusters // (SCORE_CLUSTERS * tiles))
        + PIECES[f"masses, a block{large}"] * max(shares, -(-lists.clusters // grids.MASS_BLOCK))
    )
    select, choice = _choices(shape, config, lists)
    tile = grids.candidate_tile(pairs, config.candidate_tokens)
    by_code = config.estimate and config.estimate_codes
    values = PIECES[f"values, {tile}"] + by_code * PIECES[f"values, {tile}, codes"] * shape.group / 4
    values *= -(-config.candidate_tokens // tile)
    scaled = shape.head_dim / 128
    return {
        "score": Work(score * 4 * scaled, 4, 3),
        "select: masses": Work(pairs * masses * 4, 4, 8),
        "select: clusters": select,
        "refine: values": Work(pairs * values * 4 * scaled, 4, 10 if tile == grids.FEW_CANDIDATES else 4),
        "refine: choice": choice,
        JOINED: _joined(shape, config, lists),
        "merge": Work(pairs * shape.group * PIECES["merge, a program"] * 4, 4, 8),
    }


def _choices(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> tuple[Work, Work | MixedWork]:
    """What select of clusters, and the choice of tokens, execute."""
    clusters, short, pairs = lists.clusters, short_of(config, lists), shape.pairs
    large = clusters > 4096
    of = ", large" if large else ""
    warps, listed = (16, 4096) if large else (8, 2048)
    select = (
        PIECES[f"select, a program{of}"]
        + PIECES[f"select, a halving{of}"] * HALVINGS
        + PIECES[f"select, a block of the list{of}"] * -(-clusters // grids.select_block(large))
    )
    shortlist = (
        PIECES[f"shortlist, a program{of}"]
        + PIECES[f"shortlist, a halving{of}"] * HALVINGS
        + PIECES[f"shortlist, a block{of}"] * -(-clusters // listed)
    )
    both = 2 * max(select, shortlist) if short else select  # side by side, so each takes as long as the longer
    chosen = Work(pairs * both * warps, warps, 1 if large else 2)
    of = ", short" if short else ", few" if clusters <= 1024 else of
    choice: float = PIECES[f"choice, a program{of}"] + PIECES[f"choice, a halving of each{of}"] * HALVINGS
    if short:
        warps, large = 8, False
    else:
        choice += PIECES[f"choice, a block of the list{of}"] * -(-clusters // listed)
    if not (config.estimate and config.estimate_codes):
        return chosen, Work(pairs * choice * warps, warps, 1 if large else 3)
    touched = lists.candidates // config.tokens_per_cluster
    codes = -(-touched // (32 * warps)) * (
        PIECES[f"choice, a block of codes{of}"] + LONGEST_RUN * PIECES[f"choice, eight codes of a block{of}"]
    )
    if grids.choice_programs(pairs, clusters > config.estimate_clusters) == 1:
        choice += PIECES[f"choice, codes{of}"] + codes
        return chosen, Work(pairs * choice * warps, warps, 1 if large else 2)
    codes += PIECES[f"choice, a program of codes{of}"] + PIECES[f"choice, a halving for codes{of}"] * HALVINGS
    return chosen, MixedWork([choice * warps] * pairs + [codes * warps] * pairs, warps, 1 if large else 2)


def _score(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> float:
    """Instructions of a warp of all programs of score together."""
    programs = grids.score_programs(shape.kv_heads, shape.batch, lists.base, lists.clusters)
    tiles = -(-lists.clusters // SCORE_CLUSTERS)
    of_pair = (
        PIECES["score, a program of clusters"] * programs.clusters
        + PIECES["score, a tile of clusters"] * tiles
        + PIECES["score, a segment of a tile"] * max(tiles, lists.segments)
        + PIECES["score, a program of tokens"] * programs.base
        + PIECES["score, a tile of tokens"] * -(-lists.base // SCORE_TOKENS)
        + PIECES["score, a rotation"] * config.refine
    )
    return shape.pairs * of_pair


def sparse_times(shape: StepShape, config: ClusterKVConfig, bytes_per_us: float = BYTES_PER_US) -> dict[str, Time]:
    """Each launch of one layer of a sparse step that refines and estimates."""
    work, times = work_of(shape, config), {}
    for launch in sparse_launches(shape, config):
        own, by_bytes = work[launch.name], launch.bytes / bytes_per_us
        likely = max(own.likely_us(launch.programs), by_bytes)
        times[launch.name] = Time(max(own.floor_us(), by_bytes) + GAP_US, likely + GAP_US)
    return times


def layer_time(shape: StepShape, config: ClusterKVConfig, bytes_per_us: float = BYTES_PER_US) -> Time:
    """One layer of a sparse step."""
    return Time(*map(sum, zip(*sparse_times(shape, config, bytes_per_us).values(), strict=True)))


def dense_us(shape: StepShape, bytes_per_us: float = BYTES_PER_US) -> float:
    """One layer of a dense step, which reads memory as fast as it can."""
    return least_us(dense_launches(shape), bytes_per_us)


def least_us(launches: Sequence[Launch], bytes_per_us: float) -> float:
    """Of launches one after the other, by their bytes alone."""
    return sum(launch.bytes / bytes_per_us + GAP_US for launch in launches)


def speedup(shape: StepShape, layer_us: float, other_ms: float = OTHER_MS) -> float:
    """A dense step's time over a sparse one's; layer_us: of one layer's attention; other_ms: of all else of the step."""
    dense, sparse = (other_ms + shape.layers * us / 1e3 for us in (dense_us(shape), layer_us))
    return dense / sparse
