"""How many programs the Triton launches of a decode step have: from the shapes of its lists alone, so graphs can be captured.

attend, estimate and the chain (decode/triton.py) count with these, and so does the model of the step
(`kernels/step_model.py`): nothing of Triton is imported here.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_clusterkv.kernels.workspace import MOST_SHORT, SCORE_CLUSTERS, SCORE_TOKENS

TOKENS_PER_SPLIT = 128  # of attend's list; fewer are not worth a program
LEAST_OWN = 128  # clusters, each with its own mean value, that are worth a program of the estimate
LEAST_REST = 256  # clusters that share their segment's mean value, likewise
OWN_WORK = 4  # instructions of a cluster with its own mean value, for each of one without
ATTEND_PROGRAMS = 264  # two for each of an H100's SMs
SCORE_PROGRAMS = 528  # four, for clusters
MASS_BLOCK = 512  # clusters at a time of a program of select's masses
MASS_PROGRAMS = 528  # four
MOST_BASE = 16  # programs for the always-attended tokens of a (request, kv head); usual are 10 tiles of them
FEW_CANDIDATES, MANY_CANDIDATES = 64, 256  # per program of refine's values
CANDIDATE_PROGRAMS = 264  # two: then a program takes many candidates
ESTIMATE_PROGRAMS = 528  # four, of both kinds together
LISTED_TOKENS = 256  # per program of what lists tokens for FlashInfer
MOST_ESTIMATE_PARTS = 32  # of a (request, kv head)
CHOICE_PROGRAMS = 132  # one, of the choice
PARTS_PROGRAMS = 396  # three, of attend and both kinds of the estimate together
LEAST_PARTS, MOST_PARTS = 4, 64  # of them, for a (request, kv head)


class ScorePrograms(NamedTuple):
    """Programs of score per (request, kv head), beside the one that rotates."""

    base: int  # for the request's always-attended tokens
    clusters: int  # for clusters, of whichever requests


def score_programs(heads: int, batch: int, base: int, clusters: int) -> ScorePrograms:
    """For up to `base` always-attended tokens and `clusters` clusters of a request."""
    return ScorePrograms(
        max(1, min(-(-base // SCORE_TOKENS), MOST_BASE)),
        share_count(heads * batch, clusters, SCORE_CLUSTERS, SCORE_PROGRAMS),
    )


def mass_parts(pairs: int, clusters: int) -> int:
    """Programs of select's masses per (request, kv head), for up to `clusters` clusters."""
    return share_count(pairs, clusters, MASS_BLOCK, MASS_PROGRAMS)


def select_block(large: bool) -> int:
    """Clusters that select lists at a time; large: it may have more than 4,096."""
    return 4096 if large else 1024


def own_shortlist(clusters: int, own: int, budget: int) -> int:
    """Clusters, up to a power of two, that the program which recalls looks at to choose `own` of up to `clusters`; 0: all.

    Recalling takes tokens from no more than `budget` clusters, and only lowers a mass. So the `own` largest masses are among
    the own + budget largest that there were before, which select's launch lists meanwhile.
    """
    short = _power_of_2(own + budget)
    return short if own + budget <= MOST_SHORT and short < _power_of_2(clusters) else 0


def _power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()


def candidate_tile(pairs: int, candidates: int, channels: int = 128) -> int:
    """Candidates per program of refine's values: many where there are programs enough for that, half as many of wide heads."""
    if pairs * -(-candidates // MANY_CANDIDATES) < CANDIDATE_PROGRAMS:
        return FEW_CANDIDATES
    return MANY_CANDIDATES if channels <= 128 else MANY_CANDIDATES // 2


def choice_programs(pairs: int, shared: bool) -> int:
    """Programs of refine's choice per (request, kv head): two if SMs would idle, where there is work for both (`shared`)."""
    return 2 if shared and 2 * pairs <= CHOICE_PROGRAMS else 1


def batch_of_large_tiles(heads: int, candidates: int) -> int:
    """The least batch for which `candidate_tile` takes many."""
    return -(-CANDIDATE_PROGRAMS // (heads * -(-candidates // MANY_CANDIDATES)))


class EstimateParts(NamedTuple):
    """Programs of the estimate per (request, kv head); each leaves one part."""

    own: int  # those that take clusters' own mean values
    rest: int  # those that take segments' mean values


def share_count(pairs: int, items: int, least: int, programs: int) -> int:
    """Programs that share a list of up to `items` items, `least` or more each, for `pairs` (request, kv head)."""
    return max(1, min(programs // pairs, -(-items // least)))


def split_count(pairs: int, tokens: int) -> int:
    """Parts of attend's lists of up to `tokens` tokens."""
    return share_count(pairs, tokens, TOKENS_PER_SPLIT, ATTEND_PROGRAMS)


def estimate_parts(pairs: int, clusters: int, estimate_clusters: int, moves: bool = False) -> EstimateParts:
    """Programs of the estimate, for up to `clusters` clusters: together no more than are resident at once, nor than merge takes
    at once; both kinds with about as much to do. Where values move (`moves`) there are always some of the second."""
    own_clusters = min(clusters, estimate_clusters)
    if clusters <= estimate_clusters and not moves:
        return EstimateParts(share_count(pairs, own_clusters, LEAST_OWN, ESTIMATE_PROGRAMS), 0)
    parts = max(2, min(ESTIMATE_PROGRAMS // pairs, MOST_ESTIMATE_PARTS))
    share = OWN_WORK * own_clusters / (OWN_WORK * own_clusters + clusters)
    own = max(1, min(round(parts * share), -(-own_clusters // LEAST_OWN), parts - 1))
    return EstimateParts(own, min(parts - own, -(-clusters // LEAST_REST)))


class Parts(NamedTuple):
    """Programs of a (request, kv head) in the launch of attend and the estimate; each leaves one part."""

    splits: int  # of attend's list
    own: int  # of the estimate, as in `EstimateParts`
    rest: int


# What programs execute, and for each tile of 64 tokens, 32 clusters or 256: roughly (kernels/instruction_counts.py).
ATTEND_WORK, OWN_PART_WORK, REST_WORK = (950, 450), (470, 460), (570, 900)
MOVING_WORK = (790, 1610)  # the last, where values move


def part_programs(pairs: int) -> int:
    """Programs of attend and the estimate together per (request, kv head): all are resident at once if there are few."""
    return max(LEAST_PARTS, min(PARTS_PROGRAMS // pairs, MOST_PARTS))


def divided(programs: int, base: int, recalled: int, clusters: int, limit: int, moves: bool = False) -> Parts:
    """How the programs of a (request, kv head) divide its work, which each of them finds out for itself (`division`, in
    decode/triton_parts.py): kinds have as many as their work is, and one each at least.

    Args:
        programs: of all kinds; 3 or more.
        base: always-attended tokens.
        recalled: tokens.
        clusters: of the request.
        limit: of them that are estimated at their own mean value.
        moves: values move, which is added beside segments' mean values.
    """
    tiles = -(-base // 64) + -(-recalled // 64), -(-min(clusters, limit) // 32), -(-clusters // 256)
    attend, own, rest = (
        a + b * n
        for (a, b), n in zip((ATTEND_WORK, OWN_PART_WORK, MOVING_WORK if moves else REST_WORK), tiles, strict=True)
    )
    has_rest = moves or clusters > limit
    if not has_rest:
        rest = 0
    whole = attend + own + rest
    splits = max(1, min((programs * attend + whole // 2) // whole, programs - 2))
    if not has_rest:
        return Parts(splits, programs - splits, 0)
    owned = max(1, min((programs * own + whole // 2) // whole, programs - 1 - splits))
    return Parts(splits, owned, programs - splits - owned)
