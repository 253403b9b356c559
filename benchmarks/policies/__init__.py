"""The attention policies that the evaluation compares, all through the serving backend; tests and tables take every one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.policies.anchors import CODEBOOKS, ENTRIES, LISTS, TOKENS_PER_CENTROID, DoubleP, PqHsa, VAttention
from benchmarks.policies.baselines import (
    PUBLISHED_TOKENS_PER_CLUSTER,
    QUEST_PAGE,
    BinaryCodes,
    Oracle,
    PublishedClusterKV,
    Quest,
    Window,
)
from benchmarks.policies.choices import LayerBudgets, ReusedChoice, SharedBudget
from benchmarks.policies.estimates import (
    CLUSTERS_PER_GROUP,
    ExactInside,
    MovingValues,
    OtherCap,
    TwoBitValues,
    TwoLevels,
    two_bit_bytes,
)
from benchmarks.policies.formats import Bytes, Format
from benchmarks.policies.policy import Policy, Reading, kv_bytes
from benchmarks.policies.steps import Reformed
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec
from sglang_clusterkv.memory.masses import SPREAD_CAP
from sglang_clusterkv.memory.movement import RANK

EVERYTHING = 1 << 30


def _ours(reading: Reading) -> float:
    """Centroid and mean-value rows, spreads, list ends, segment vectors, candidates' codes and offsets."""
    config = reading.config
    clusters = reading.clustered / config.tokens_per_cluster
    found = clusters * (_row(reading) + 2 + 2) + _segments(reading)
    if config.estimate:
        found += min(clusters, config.estimate_clusters) * _row(reading)
    return found + _candidates(reading)


def _movement(reading: Reading, rows: int = 2 * RANK) -> float:
    """By how much the segments' values move: so many rows in four bits of each."""
    return reading.clustered / reading.config.segment_tokens * rows * RowCodec("int4", reading.head_dim).row_bytes


def _row(reading: Reading) -> int:
    """A centroid's or a mean value's."""
    return RowCodec(reading.config.centroid_dtype, reading.head_dim).row_bytes


def _segments(reading: Reading) -> float:
    """Their three vectors, and where something is estimated, by how much values move."""
    config = reading.config
    moving = config.estimate and config.moving_values != "never"
    vectors = reading.clustered / config.segment_tokens * 3 * 2 * reading.head_dim
    return vectors + (_movement(reading) if moving else 0)


def _candidates(reading: Reading) -> float:
    """Their offsets, and codes where they are refined."""
    config = reading.config
    if not config.refine:
        return 2 * config.budget_tokens
    code = TokenCodec(config.code_bits, reading.head_dim).code_bytes + 2
    return min(reading.clustered, config.candidate_tokens) * (code + 2)


def _two_bit_values(reading: Reading) -> float:
    """As ours, with shorter mean values."""
    own = min(reading.clustered / reading.config.tokens_per_cluster, reading.config.estimate_clusters)
    return _ours(reading) - own * (_row(reading) - two_bit_bytes(reading.head_dim))


def _two_levels(opened: float) -> Callable[[Reading], float]:
    """Groups: both rows, spread, place, size. Clusters of opened groups: as ours, and their numbers."""

    def metadata_bytes(reading: Reading) -> float:
        config, row = reading.config, _row(reading)
        clusters = reading.clustered / config.tokens_per_cluster
        scored = min(clusters, opened * config.candidate_tokens / config.tokens_per_cluster)
        found = clusters / CLUSTERS_PER_GROUP * (2 * row + 2 + 2 + 2) + scored * (row + 2 + 2 + 2)
        return found + min(scored, config.estimate_clusters) * row + _segments(reading) + _candidates(reading)

    return metadata_bytes


def _reused(steps: int) -> Callable[[Reading], float]:
    """As ours, with the candidates' codes and offsets read in one of so many steps, or in as many as were counted."""

    def metadata_bytes(reading: Reading) -> float:
        whole = msgspec.structs.replace(reading.config, refine=False)
        scored = _ours(reading._replace(config=whole)) - 2 * reading.config.budget_tokens
        return scored + (_ours(reading) - scored) * (1 / steps if reading.chosen is None else reading.chosen)

    return metadata_bytes


def _moving_values(rank: int | None = None, shared: bool = False) -> Callable[[Reading], float]:
    """As ours, and the covariance of values and keys in four bits: of every segment or of the request, whole or as factors."""

    def metadata_bytes(reading: Reading) -> float:
        moved = _movement(reading, reading.head_dim if rank is None else 2 * rank)
        if shared:
            moved *= reading.config.segment_tokens / reading.clustered
        still = msgspec.structs.replace(reading.config, moving_values="never")
        return _ours(reading._replace(config=still)) + moved

    return metadata_bytes


def _quest(reading: Reading) -> float:
    return reading.clustered / QUEST_PAGE * 2 * 2 * reading.head_dim


def _published(reading: Reading) -> float:
    """Centroids in bf16, sizes, and the places of the recalled tokens."""
    clusters = reading.clustered / PUBLISHED_TOKENS_PER_CLUSTER
    return clusters * (2 * reading.head_dim + 4) + 2 * reading.config.budget_tokens


def _pq_hsa(reading: Reading) -> float:
    """Lists' directions and mean values in bf16, codebooks; of every token its list, half a byte per codebook, its length."""
    rows = LISTS * 2 * 2 * reading.head_dim + ENTRIES * 2 * reading.head_dim
    return rows + reading.clustered * (2 + CODEBOOKS / 2 + 2)


def _double_p(reading: Reading) -> float:
    """Centroids and mean values in bf16, sizes, and the places of the tokens that are read."""
    clusters = reading.clustered / TOKENS_PER_CENTROID
    return clusters * (2 * 2 * reading.head_dim + 4) + 2 * reading.config.budget_tokens


def _codes(reading: Reading) -> float:
    return reading.clustered * (TokenCodec(1, reading.head_dim).code_bytes + 2)


# Of SmolLM2-135M, by benchmarks.quality.attention_level.
ERRORS = Path(__file__).parents[1] / "results" / "quality-attention-20261128-084441.json"


def _by_error(budget: int) -> LayerBudgets:
    found = json.loads(ERRORS.read_text())["results"]["ours, 256"]
    return LayerBudgets(budget, np.array(found["error"]).mean(1))


STILL: dict[str, object] = {"moving_values": "never"}
_NO_CODES: dict[str, object] = {"estimate_codes": False}  # what an earlier step chose are not this step's candidates

POLICIES: dict[str, Policy] = {
    "dense": Policy("dense", lambda r: 0.0, {"dense_below_tokens": EVERYTHING}, is_method=False),
    "window": Policy("last B tokens", lambda r: 0.0, make=Window),
    "quest": Policy("Quest, pages of 16", _quest, make=Quest),
    "published": Policy("ClusterKV as published", _published, make=PublishedClusterKV),
    "published-dense2": Policy(
        "ClusterKV as published, 2 dense layers", _published, {"dense_layers": 2}, make=PublishedClusterKV
    ),
    "codes": Policy("1-bit codes of all tokens", _codes, make=BinaryCodes),
    "pq-hsa": Policy("PQ-HSA", _pq_hsa, make=PqHsa),
    "double-p": Policy("Double-P", _double_p, make=DoubleP),
    "vattention": Policy("vAttention, over ours", _ours, {"estimate": False}, make=lambda budget: VAttention()),
    "ours": Policy("ours", _ours),
    "ours-no-estimate": Policy("ours without the estimate", _ours, {"estimate": False}),
    "ours-still-values": Policy("ours, values that stay", _ours, STILL),
    "ours-no-spread": Policy("ours without spread", _ours, {"choice_spread": 0.0, "estimate_spread": 0.0}),
    "ours-whole-clusters": Policy("ours, whole clusters (no refining)", _ours, {"refine": False}),
    "ours-reused-2": Policy("ours, a choice serves 2 steps", _reused(2), _NO_CODES, lambda budget: ReusedChoice(2)),
    "ours-reused-4": Policy("ours, a choice serves 4 steps", _reused(4), _NO_CODES, lambda budget: ReusedChoice(4)),
    "ours-reused-4-alike": Policy(
        "ours, a choice serves 4 steps while cosine >= .9",
        _reused(1),
        _NO_CODES,
        lambda budget: ReusedChoice(4, 0.9),
        counted=True,
    ),
    "ours-shared-budget": Policy("ours, heads of a layer share their budgets", _ours, make=SharedBudget),
    "ours-layer-budgets": Policy("ours, budgets of layers by their errors", _ours, make=_by_error),
    "ours-cap-1": Policy("ours, spread capped at 1", _ours, make=lambda budget: OtherCap(1.0)),
    "ours-cap-4": Policy("ours, spread capped at 4", _ours, make=lambda budget: OtherCap(4.0)),
    "ours-no-cap": Policy("ours, spread without a cap", _ours, make=lambda budget: OtherCap(math.inf)),
    "ours-choice-cap": Policy(
        "ours, spread capped in the choice too", _ours, make=lambda budget: OtherCap(SPREAD_CAP, SPREAD_CAP)
    ),
    "ours-two-bit-values": Policy("ours, mean values in two bits", _two_bit_values, make=lambda budget: TwoBitValues()),
    "ours-two-levels-1": Policy(
        "ours, two levels, as many tokens opened as candidates", _two_levels(1), make=lambda budget: TwoLevels(1)
    ),
    "ours-two-levels-2": Policy(
        "ours, two levels, twice as many tokens opened", _two_levels(2), make=lambda budget: TwoLevels(2)
    ),
    "ours-moving-values": Policy(
        "ours, values move with keys", _moving_values(), STILL, make=lambda budget: MovingValues(0.25)
    ),
    "ours-moving-values-1": Policy(
        "ours, values move with keys, in full", _moving_values(), STILL, make=lambda budget: MovingValues(1.0)
    ),
    "ours-moving-values-rank-8": Policy(
        "ours, values move with keys, rank 8", _moving_values(8), STILL, make=lambda budget: MovingValues(0.25, rank=8)
    ),
    "ours-moving-values-rank-2": Policy(
        "ours, values move with keys, rank 2", _moving_values(2), STILL, make=lambda budget: MovingValues(0.25, rank=2)
    ),
    "ours-moving-values-shared": Policy(
        "ours, values move with keys alike in all segments",
        _moving_values(shared=True),
        STILL,
        make=lambda budget: MovingValues(0.25, shared=True),
    ),
    "ours-exact-inside": Policy(
        "ours, exact inside clusters", _ours, make=lambda budget: ExactInside(), is_method=False
    ),
    "oracle": Policy("oracle: exact top-B tokens", lambda r: 0.0, make=Oracle, is_method=False),
}


def _reformed(title: str, form: Format) -> Policy:
    """Ours in another format."""
    return Policy(
        f"ours, {title}",
        lambda reading: Bytes(form, reading).read(),
        make=lambda budget: Reformed(form),
        counted=form.margin is not None or form.every > 1,
    )


FORMATS: dict[str, tuple[str, Format]] = {
    "ours-tables": ("by tables, with values that stay", Format()),
    "ours-before": ("as it was up to 2026-11-29", Format(recalled_by="mean")),
    "ours-16-tokens": ("16 tokens per cluster", Format(tokens_per_cluster=16)),
    "ours-3-bit-centroids": ("centroids in 3 bits", Format(centroid_bits=3)),
    "ours-3-bit-turned-centroids": ("centroids rotated, in 3 bits", Format(centroid_bits=3, turned=True)),
    "ours-8-bit-vectors": ("segments' vectors in 8 bits", Format(vector_bits=8)),
    "ours-shared-values": ("mean values of two neighbours", Format(clusters_per_value=2)),
    "ours-1-bit": ("1-bit codes", Format(code_bits=1)),
    "ours-second-look": ("1 bit of all candidates, 2 of the better half", Format(second_look=True)),
    "ours-8-bit-scales": ("codes' scales in 8 bits", Format(scale="token8")),
    "ours-cluster-scales": ("codes' scales by cluster", Format(scale="cluster")),
    "ours-rank-8": ("values move with keys, rank 8 in 4 bits", Format(rank=8)),
    "ours-margin-2": ("candidates within 2 nats of the budget's last", Format(margin=2.0)),
    "ours-margin-4": ("candidates within 4 nats of the budget's last", Format(margin=4.0)),
    "ours-shared-last": ("heads share budgets by the last step's masses", Format(shared="last")),
    "ours-candidates-2": ("candidates serve 2 steps", Format(every=2)),
    "ours-candidates-4": ("candidates serve 4 steps", Format(every=4)),
    "ours-candidates-4-alike": ("candidates serve 4 steps while cosine >= .8", Format(every=4, least_cosine=0.8)),
    "ours-recalled-2": ("recalled tokens serve 2 steps", Format(every=2, reused="recalled")),
    "ours-recalled-2-alike-80": (
        "recalled tokens serve 2 steps while cosine >= .8",
        Format(every=2, reused="recalled", least_cosine=0.8),
    ),
    "ours-recalled-2-alike-90": (
        "recalled tokens serve 2 steps while cosine >= .9",
        Format(every=2, reused="recalled", least_cosine=0.9),
    ),
    "ours-recalled-2-alike-95": (
        "recalled tokens serve 2 steps while cosine >= .95",
        Format(every=2, reused="recalled", least_cosine=0.95),
    ),
    "ours-codes-in-estimate": ("candidates' codes in the estimate", Format(codes_in_estimate=True)),
    "ours-left-values": ("mean values of what is left", Format(left_values=True)),
    "ours-left-logits": ("mean logits of what is left", Format(left_logits=True)),
    "ours-8-percent": (
        "1-bit codes with scales by cluster, rotated centroids in 3 bits, vectors in 8",
        Format(code_bits=1, scale="cluster", centroid_bits=3, turned=True, vector_bits=8),
    ),
    "ours-8-percent-codes": (
        "the same, candidates' codes in the estimate",
        Format(code_bits=1, scale="cluster", centroid_bits=3, turned=True, vector_bits=8, codes_in_estimate=True),
    ),
    "ours-8-percent-codes-rank-4": (
        "the same, values move with keys, rank 4",
        Format(
            code_bits=1, scale="cluster", centroid_bits=3, turned=True, vector_bits=8, codes_in_estimate=True, rank=4
        ),
    ),
    "ours-codes-rank-8": (
        "candidates' codes in the estimate, values move with keys",
        Format(codes_in_estimate=True, rank=8),
    ),
}
POLICIES |= {name: _reformed(*entry) for name, entry in FORMATS.items()}

__all__ = ["FORMATS", "POLICIES", "Policy", "Reading", "kv_bytes"]
