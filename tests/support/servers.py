"""The servers that test files share, by name: their sizes and options, and who ends them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from benchmarks.servers import Server

CHUNK = 2048
POOL = 8192
DEMO_CHUNK = 512
# One dense layer, so that a step has layers of both kinds. Counts of tokens clustered are exact without merging.
DEMO_CONFIG = {
    "budget_tokens": 128,
    "candidate_tokens": 512,
    "segment_tokens": 256,
    "recluster_every": 64,
    "dense_layers": 1,
    "merge_segments": False,
}
ASLEEP = "--sleep-on-idle"  # without it an idle server takes most of a core from the tests that follow


class OneServer:
    """Keeps the server that was last asked for: one may serve several files in turn, and no two are up at a time."""

    def __init__(self) -> None:
        self._name = ""
        self._server: Server | None = None
        self._running = ExitStack()

    def get(self, name: str, start: Callable[[], AbstractContextManager[Server]]) -> Server:
        """The server of that name; ends another one and starts it where need be."""
        if self._server is None or name != self._name:
            self.end()
            self._server = self._running.enter_context(start())
            self._name = name
        return self._server

    def end(self) -> None:
        """End the server, if there is one."""
        self._server = None
        self._running.close()
