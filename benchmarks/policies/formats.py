"""Ours, stored and read otherwise: what may differ, and the bytes of it; one function for what is stored, one for a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.policies.policy import Reading
from sglang_clusterkv.memory.codec import channels_per_scale

PAGE = 16  # tokens; a segment's vectors lie in quarters on its pages, with room for them on each
SPREAD, END, MEMBER, NUMBER = 2, 2, 2, 1  # bytes: of a cluster; of a token; of a cluster's shared mean value
WHOLE_SCALE = 2
SCALE_BYTES = {"token": WHOLE_SCALE, "token8": 1, "cluster": 0}


@dataclass(frozen=True)
class Format:
    """The defaults are what is served, but that values stay and codes are not in the estimate.

    Attributes:
        tokens_per_cluster: on average; None: the clusters that are stored.
        centroid_bits: per channel of a centroid, with a scale for 32 channels.
        turned: centroids are rotated and have the levels of a normal variable, with one scale.
        vector_bits: of the segments' three vectors, 16 or 8.
        clusters_per_value: that share a mean value, 1 or 2; shared ones are all read.
        code_bits: 1 or 2, per channel of a token.
        second_look: signs of all candidates are read first, the other bit only of the better half.
        scale: of a code: two bytes or one per token, or two per cluster.
        rank: of the values' movement with keys, in four bits; 0: they don't.
        margin: nats; a cluster whose mass per token is by more than this below that of the cluster which completes the budget
            is no candidate; None: all are, up to `candidate_tokens`.
        shared: heads of a layer share their budgets by the masses of this step or by those of the last one.
        every: steps that a choice serves.
        reused: what such a choice is: candidates, of which each step recalls the best by its own query, or recalled tokens.
        least_cosine: of every query to that of the choice, else a head chooses anew.
        codes_in_estimate: candidates that were not recalled count with the logits of their codes, as with `estimate_codes`.
        left_logits: a cluster's mean logit is that of its tokens left: without the recalled ones' own.
        left_values: a cluster's mean value likewise.
        recalled_by: tokens with the most mass of one query head are recalled, or those with the most on average.
    """

    tokens_per_cluster: int | None = None
    centroid_bits: int = 4
    turned: bool = False
    vector_bits: int = 16
    clusters_per_value: int = 1
    code_bits: int = 2
    second_look: bool = False
    scale: Literal["token", "token8", "cluster"] = "token"
    rank: int = 0
    margin: float | None = None
    shared: Literal["never", "now", "last"] = "never"
    every: int = 1
    reused: Literal["candidates", "recalled"] = "candidates"
    least_cosine: float = -1.0
    codes_in_estimate: bool = False
    left_logits: bool = False
    left_values: bool = False
    recalled_by: Literal["largest", "mean"] = "largest"


class Bytes:
    """What a format comes to, per kv head.

    Args:
        form: the format.
        reading: a step.
    """

    def __init__(self, form: Format, reading: Reading) -> None:
        self._form, self._reading = form, reading
        self._tokens = float(form.tokens_per_cluster or reading.config.tokens_per_cluster)
        self._centroid = self._row(form.centroid_bits, form.turned)
        self._value = self._row(4)
        self._code = form.code_bits * reading.head_dim / 8
        quarter = form.vector_bits * reading.head_dim / 32 + (WHOLE_SCALE if form.vector_bits < 16 else 0)
        self._vectors = 3 * 4 * quarter

    def stored(self) -> dict[str, float]:
        """Of the index, per token, part by part."""
        form, tokens = self._form, self._tokens
        shared = form.clusters_per_value > 1
        return {
            "centroids": self._centroid / tokens,
            "mean values": (self._value / form.clusters_per_value + NUMBER * shared) / tokens,
            "spreads and ends": (SPREAD + END) / tokens,
            "members": MEMBER,
            "codes": self._code,
            "scales of codes": SCALE_BYTES[form.scale] + (WHOLE_SCALE / tokens if form.scale == "cluster" else 0),
            "segments' vectors": self._vectors / 4 / PAGE,
            "movement of values": 2 * form.rank * self._row(4) / self._reading.config.segment_tokens
            if form.rank
            else 0,
        }

    def share(self) -> float:
        """Of the index in a KV cache of 16 bits."""
        return sum(self.stored().values()) / (4 * self._reading.head_dim)

    def read(self) -> float:
        """By a step, beside the tokens that it attends to."""
        form, reading, config = self._form, self._reading, self._reading.config
        clusters = reading.clustered / self._tokens
        segments = reading.clustered / config.segment_tokens
        found = clusters * (self._centroid + SPREAD + END) + segments * self._vectors
        if form.clusters_per_value > 1:
            found += clusters * (NUMBER + self._value / form.clusters_per_value)
        else:
            found += min(clusters, config.estimate_clusters) * self._value
        found += segments * 2 * form.rank * self._value if form.rank else 0
        candidates = min(reading.clustered, config.candidate_tokens)
        listed = candidates * (MEMBER + SCALE_BYTES[form.scale] + self._code / (1 + form.second_look))
        if form.second_look:
            listed += candidates / 2 * self._code / 2
        if form.scale == "cluster":
            listed += candidates / self._tokens * WHOLE_SCALE
        if form.reused == "recalled":
            listed *= 1 / form.every if reading.chosen is None else reading.chosen
        return found + listed

    def _row(self, bits: int, turned: bool = False) -> float:
        channels = self._reading.head_dim
        return bits * channels / 8 + WHOLE_SCALE * (1 if turned else channels / channels_per_scale(channels))
