"""A plugin of SGLang that lets a host tier's refills fail while it is told to, on all ranks or on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TRIGGER = "refills-fail"


def fail(folder: Path, rank: int | None = None) -> None:
    """From now on; None: on all ranks."""
    (folder / _TRIGGER).write_text("" if rank is None else str(rank))


def succeed(folder: Path) -> None:
    """From now on."""
    (folder / _TRIGGER).unlink()


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang_clusterkv.clusters.residency import TieredResidency

    fill = TieredResidency._fill

    def fails_or_fills(self: TieredResidency, *arguments: Any) -> int:
        from sglang.srt.runtime_context import get_parallel

        trigger = Path(__file__).parent / _TRIGGER
        if trigger.exists() and trigger.read_text() in ("", str(get_parallel().tp_rank)):
            raise RuntimeError("a fault of the test")
        return fill(self, *arguments)

    TieredResidency._fill = fails_or_fills  # type: ignore[method-assign]
