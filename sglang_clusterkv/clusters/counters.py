"""What the engine did since it was made, and what went wrong in it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from sglang_clusterkv.clusters.rows import DenseReason, Row

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0
_FAULT = DenseReason.FAULT.name.lower()
_OTHERS = "others"
_NOT_SHOWN = ("build_s", "_told")
_ADVICE = {
    _OTHERS: "the requests concerned decode densely and are looked at again later. Lower --mem-fraction-static where memory "
    "is short",
    "trace": "the traces under way are kept no further, and no step was changed",
    "offload": "pages stay on the device, it is tried again at the next forward, and prefills wait meanwhile if need be. "
    "Lower host_ratio, which leaves the device tier more pages, or give the host more memory",
}


class StepCounts(NamedTuple):
    """What a step comes to if its layers do as its lists say: counted once they have."""

    sparse: int  # requests of a decode step
    dense: Counter[str]  # likewise, by reason
    tokens_available: int
    tokens_recalled: int
    recalled_extends: int = 0  # requests of a prefill
    recalled_extend_tokens: int = 0

    @classmethod
    def of_faults(cls, requests: int) -> StepCounts:
        """A step that is dense because our own code failed."""
        return cls(0, Counter({_FAULT: requests}), 0, 0)

    def turned_dense(self) -> StepCounts:
        """The same step, whose sparse requests attended to everything from some layer on: a fault."""
        return StepCounts(0, self.dense + Counter({_FAULT: self.sparse}), 0, 0)


@dataclass
class Counters:
    """Counts of one engine of what has happened; all rise."""

    segments: int = 0
    tokens_clustered: int = 0
    tokens_reused: int = 0
    tokens_recalled: int = 0
    tokens_available: int = 0
    sparse_steps: int = 0
    recalled_extends: int = 0
    recalled_extend_tokens: int = 0
    splits: int = 0
    merges: int = 0
    forced_borders: int = 0
    build_conflicts: int = 0
    index_violations: int = 0
    build_s: float = 0.0
    dense_steps: Counter[str] = field(default_factory=Counter)  # requests of a step, by reason
    dense_layer_calls: Counter[str] = field(default_factory=Counter)  # requests of one layer of a step, by reason
    # Steps that captured graphs had no room for, by what there was too much of.
    steps_without_graph: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)  # exceptions of our own code that were survived, by operation
    _told: Counter[str] = field(default_factory=Counter)  # of the device's counts, what is in these

    def server_info(self) -> dict[str, object]:
        """All of them for /server_info: integers, and dictionaries by reason or operation."""
        values = {count.name: getattr(self, count.name) for count in fields(self) if count.name not in _NOT_SHOWN}
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}
        return plain | {"build_ms": round(1000 * self.build_s)}

    def note_violations(self, conflicts: int, out_of_range: int) -> None:
        """What the device has counted since the start (`ClusterIndex.violations`); warns of what is new."""
        for name, now, what in (
            ("build_conflicts", conflicts, "pages were clustered while they were another segment's"),
            ("index_violations", out_of_range, "indices were out of range and taken as 0"),
        ):
            new = now - self._told[name]
            if new > 0:
                self._told[name] = now
                setattr(self, name, getattr(self, name) + new)
                logger.warning(
                    "clusterkv: %d %s, %d so far: what is recalled may be wrong until the requests concerned end; "
                    "please report this.", new, what, now,
                )  # fmt: skip

    def announce(self, record: Row) -> None:
        """Say once per request, when its prefill is planned, what was clustered and what was reused."""
        if record.announced or record.prefilling:
            return
        record.announced = True
        self.tokens_reused += record.reused_tokens
        if record.clustered_tokens or record.reused_tokens:  # a short prompt has nothing to say
            logger.info(
                "clusterkv: request %s: %d prompt tokens, %d cached, %d clustered, %d reused",
                record.rid, record.prompt_len, record.cached_tokens, record.clustered_tokens, record.reused_tokens,
            )  # fmt: skip

    def add(self, step: StepCounts) -> None:
        """A step has run."""
        self.dense_steps.update(step.dense)
        self.sparse_steps += step.sparse
        self.tokens_available += step.tokens_available
        self.tokens_recalled += step.tokens_recalled
        self.recalled_extends += step.recalled_extends
        self.recalled_extend_tokens += step.recalled_extend_tokens


class Faults:
    """Counts exceptions of our own code that cost speed and nothing else, and warns of them, not more than once a minute
    per operation.

    Args:
        counts: where to count.
    """

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._said_at: dict[str, float] = {}

    def note(self, operation: str, error: Exception) -> None:
        """Count a failed operation and say so, with the traceback the first time."""
        self._counts[operation] += 1
        now = time.monotonic()
        first = operation not in self._said_at
        if first or now - self._said_at[operation] >= _SAY_EVERY_S:
            self._said_at[operation] = now
            logger.warning(
                "clusterkv: %s failed (%s: %s), %d times so far: %s; otherwise please report this, and serve "
                "with another --attention-backend if it goes on.",
                operation, type(error).__name__, error, self._counts[operation], _ADVICE.get(operation, _ADVICE[_OTHERS]),
                exc_info=error if first else None,
            )  # fmt: skip
