"""The time that a decode step needs on an H200, from bytes and from instructions: the least, and what is likely.

A launch needs its bytes (`step_model.py`) at nine tenths of the memory's bandwidth, or its instructions, whichever takes
longer, and a gap before it. Instructions are those of machine code (`instruction_counts.py`) times how often a step's lists
let them run. The floor is four of them per cycle and SM, which no code exceeds. Likely is what kernels of this kind reach: .16
per cycle and resident warp, 2.2 at most; this may be wrong by half either way, until a GPU has run them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.instruction_counts import PIECES
from sglang_clusterkv.kernels.step_model import SMS, dense_launches, lists_of, sparse_launches
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.kernels.step_model import Launch, Lists, StepShape

CYCLES_PER_US = 1800
BYTES_PER_US = 4.3e6  # an H200's 4.8 TB/s, less a tenth
GAP_US = 1.2  # before a launch, in a captured graph
FLOOR_PER_CYCLE = 4.0
LIKELY_PER_CYCLE, LIKELY_PER_WARP = 2.2, 0.16
HALVINGS = 13  # of a bracket, of masses as models have them
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


def work_of(shape: StepShape, config: ClusterKVConfig) -> dict[str, Work]:
    """What the launches of one layer execute, by name. Counted at head_dim 128; other sizes are taken as proportional."""
    lists, pairs = lists_of(shape, config), shape.pairs
    large = ", large" if lists.clusters > 4096 else ""
    warps, listed, tiles = (16, 4096, 64) if large else (8, 2048, 16)
    score = _score(shape, config, lists)
    shares = grids.mass_parts(pairs, lists.clusters)
    masses = (
        PIECES[f"masses, a program{large}"] * shares
        + PIECES[f"masses, tiles of log-sum-exps{large}"] * shares * -(-lists.clusters // (SCORE_CLUSTERS * tiles))
        + PIECES[f"masses, a block{large}"] * max(shares, -(-lists.clusters // grids.MASS_BLOCK))
    )
    select = (
        PIECES[f"select, a program{large}"]
        + PIECES[f"select, a halving{large}"] * HALVINGS
        + PIECES[f"select, a block of the list{large}"] * -(-lists.clusters // grids.select_block(bool(large)))
    )
    tile = grids.candidate_tile(pairs, config.candidate_tokens)
    by_code = config.estimate and config.estimate_codes
    values = PIECES[f"values, {tile}"] + by_code * PIECES[f"values, {tile}, codes"] * shape.group / 4
    values *= -(-config.candidate_tokens // tile)
    choice = (
        PIECES[f"choice, a program{large}"]
        + PIECES[f"choice, a halving of each{large}"] * HALVINGS
        + PIECES[f"choice, a block of the list{large}"] * -(-lists.clusters // listed)
        + by_code * PIECES[f"choice, codes{large}"] * (shape.group + 1) / 5  # a scan for each query head, and one
    )
    splits = grids.split_count(pairs, lists.base + lists.recalled)
    attend = (
        PIECES["attend, a program"] * splits
        + PIECES["attend, a tile of the base"] * -(-lists.base // 64)
        + PIECES["attend, a tile of recalled tokens"] * -(-lists.recalled // 64)
    )
    parts = grids.estimate_parts(pairs, lists.clusters, config.estimate_clusters)
    own = min(config.estimate_clusters, lists.clusters)
    own_tiles = parts.own * math.ceil(math.ceil(own / parts.own) / 32)
    rest_tiles = max(parts.rest, -(-lists.clusters // 256))
    estimate = (
        PIECES["estimate, a program of own values"] * parts.own
        + PIECES["estimate, a tile of own values"] * own_tiles
        + (PIECES["estimate, a program of the rest"] * parts.rest + PIECES["estimate, a tile of the rest"] * rest_tiles)
        * bool(parts.rest)
    )
    scaled = shape.head_dim / 128
    return {
        "score": Work(score * 4 * scaled, 4, 3),
        "select: masses": Work(pairs * masses * 4, 4, 8),
        "select: clusters": Work(pairs * select * warps, warps, 1 if large else 2),
        "refine: values": Work(pairs * values * 4 * scaled, 4, 10 if tile == grids.FEW_CANDIDATES else 4),
        "refine: choice": Work(pairs * choice * warps, warps, 1 if large else 2 if by_code else 3),
        "attend": Work(pairs * attend * 4 * scaled, 4, 4),
        "estimate": Work(pairs * estimate * 4 * scaled, 4, 4),
        "merge": Work(pairs * shape.group * PIECES["merge, a program"] * 4, 4, 8),
    }


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
