"""The order in which the device works through what the engine gives it.

The engine hands all of its device work to one of these and waits for the device only through an `Event`. So the tests can
put in a stream that lags behind the host, as an accelerator's does, on a machine that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in the stream."""

    def synchronize(self) -> None:
        """Return once the device has come here."""

    def query(self) -> bool:
        """Whether it has; does not wait."""


class _Reached:
    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class ForwardStream:
    """The current stream of an accelerator; on the CPU work is done at once.

    Args:
        device: its type, "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._queue: torch.cuda.Stream | None = None  # of the forward that was launched last

    def launched(self) -> None:
        """A forward is launched: the current stream is the one that it runs on."""
        if self._device != "cpu":
            self._queue = torch.cuda.current_stream()

    @contextmanager
    def between_forwards(self) -> Iterator[None]:
        """What is run in here goes behind the last forward's work, wherever the caller's stream is, and behind the caller's."""
        if self._queue is None:
            yield
            return
        self._queue.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._queue):
            yield

    def run(self, work: Callable[..., object], *arguments: Any) -> None:
        """Queue `work(*arguments)` behind everything that was queued before."""
        work(*arguments)

    def event(self) -> Event:
        """A point behind everything that was queued so far."""
        if self._device == "cpu":
            return _Reached()
        event = torch.cuda.Event()
        event.record()
        return event
