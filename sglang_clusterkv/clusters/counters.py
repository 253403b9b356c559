"""What the engine did since it was made, and what went wrong in it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0


@dataclass
class Counters:
    """Counts of one engine; all rise."""

    segments: int = 0
    tokens_clustered: int = 0
    tokens_reused: int = 0
    tokens_recalled: int = 0
    tokens_available: int = 0
    sparse_steps: int = 0
    splits: int = 0
    merges: int = 0
    forced_borders: int = 0
    build_conflicts: int = 0
    build_s: float = 0.0
    dense_steps: Counter[str] = field(default_factory=Counter)  # requests of a step, by reason
    dense_layer_calls: Counter[str] = field(default_factory=Counter)  # requests of one layer of a step, by reason
    faults: Counter[str] = field(default_factory=Counter)  # exceptions of our own code that were survived, by operation


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
                "clusterkv: %s failed (%s: %s), %d times so far: the requests concerned decode densely and are looked at "
                "again later. Lower --mem-fraction-static where memory is short; otherwise please report this, and serve "
                "with another --attention-backend if it goes on.",
                operation, type(error).__name__, error, self._counts[operation], exc_info=error if first else None,
            )  # fmt: skip
