"""Prompts whose new tokens recall: which of a prefill batch do, and their lists (`recall_extend_tokens`).

Each new token is a request of a decode step at its own position, and reads what that step would. All keys and values of the new
tokens are in the pool before the first of them attends.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.backoff import BackOff
from sglang_clusterkv.clusters.counters import StepCounts
from sglang_clusterkv.clusters.decoding import DecodeLists
from sglang_clusterkv.clusters.rows import Extend, Row
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.step import SparseStep

MOST_TOGETHER = 64  # new tokens whose scores are held at once


class ExtendStep(NamedTuple):
    """How the requests of a prefill batch attend that recall."""

    recalls: np.ndarray  # bool [B]; the others attend to everything
    parts: list[tuple[torch.Tensor, SparseStep]]  # int64 [n], places in the batch's queries, and their lists
    counts: StepCounts


def may_recall(extends: list[Extend], records: list[Row | None], config: ClusterKVConfig) -> dict[int, Row]:
    """The requests of a prefill batch that may recall: all that such a prompt did not find is one chunk of few enough tokens,
    behind more than a step recalls.

    Returns:
        Place in the batch -> its record.
    """
    found = {}
    for place, (extend, record) in enumerate(zip(extends, records, strict=True)):
        few = extend.end_tokens - extend.prefix_tokens <= config.recall_extend_tokens
        first = record is not None and record.cached_tokens == extend.prefix_tokens > config.budget_tokens
        if record is not None and few and first and extend.last_chunk:
            found[place] = record
    return found


def extend_step(
    decoding: DecodeLists, extends: list[Extend], chosen: list[int], looks: BackOff, layers: BackOff
) -> ExtendStep | None:
    """Lists for the new tokens of some requests; None where none of them can recall.

    A request recalls with all of its new tokens or with none.

    Args:
        decoding: makes the lists of decode steps.
        extends: all requests of the batch.
        chosen: places of those that may recall; their rows were walked.
        looks: as `DecodeLists.step` takes them.
        layers: likewise.
    """
    prefix, end, row = (
        np.array([getattr(extend, name) for extend in extends], np.int64)
        for name in ("prefix_tokens", "end_tokens", "row")
    )
    recalls = np.isin(np.arange(len(extends)), chosen)
    request = np.repeat(np.arange(len(extends)), end - prefix)  # of each new token
    begins = np.cumsum(end - prefix) - (end - prefix)
    seq_lens = np.arange(len(request)) - begins[request] + prefix[request] + 1
    reasons, count, _ = decoding.reasons(row[request], seq_lens, looks, layers)
    recalls[request[reasons > 0]] = False
    at = np.flatnonzero(recalls[request])
    if not len(at):
        return None
    # Parts of one size, so that their buffers are: the last one takes some tokens of the one before again.
    parts = -(-len(at) // MOST_TOGETHER)
    size = -(-len(at) // parts)
    lists = []
    for begin in range(0, len(at), size):
        part = at[min(begin, len(at) - size) :][:size]
        lists.append((torch.from_numpy(part), decoding.sparse(row[request[part]], seq_lens[part], count[part])))
    counts = StepCounts(0, Counter(), 0, 0, int(recalls.sum()), len(at))
    return ExtendStep(recalls, lists, counts)
