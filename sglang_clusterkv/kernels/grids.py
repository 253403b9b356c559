"""How many programs the Triton launches of a decode step have: from the shapes of its lists alone, so graphs can be captured.

attend, estimate and the chain (decode/triton.py) count with these, and so does the model of the step
(`kernels/step_model.py`): nothing of Triton is imported here.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS

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
MOST_ESTIMATE_PARTS = 32  # of a (request, kv head)


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


def candidate_tile(pairs: int, candidates: int, channels: int = 128) -> int:
    """Candidates per program of refine's values: many where there are programs enough for that, half as many of wide heads."""
    if pairs * -(-candidates // MANY_CANDIDATES) < CANDIDATE_PROGRAMS:
        return FEW_CANDIDATES
    return MANY_CANDIDATES if channels <= 128 else MANY_CANDIDATES // 2


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


def estimate_parts(pairs: int, clusters: int, estimate_clusters: int) -> EstimateParts:
    """Programs of the estimate, for up to `clusters` clusters: together no more than are resident at once, nor than merge takes
    at once; both kinds with about as much to do."""
    own_clusters = min(clusters, estimate_clusters)
    if clusters <= estimate_clusters:
        return EstimateParts(share_count(pairs, own_clusters, LEAST_OWN, ESTIMATE_PROGRAMS), 0)
    parts = max(2, min(ESTIMATE_PROGRAMS // pairs, MOST_ESTIMATE_PARTS))
    share = OWN_WORK * own_clusters / (OWN_WORK * own_clusters + clusters)
    own = max(1, min(round(parts * share), -(-own_clusters // LEAST_OWN)))
    return EstimateParts(own, min(parts - own, -(-clusters // LEAST_REST)))
