"""The servers that test files share, by name: their sizes and options, and who ends them.

A start takes half a minute of two cores, three imports of SGLang for the most part. A new file takes a server that is there:

- fixture `tiny_server`: a random model of two layers with a generous budget. Answers are exact and cost milliseconds: for
  what the scheduler does, for refusals, for whatever needs no text.
- fixture `demo_server`: SmolLM2 with a small budget, metrics and the cache report. For text, clients and counts of clusters.

Its test module says `pytestmark = pytest.mark.server`, and its file has a line in `SHARED_SERVERS` (tests/conftest.py): without
it another process starts a second one. A test calls `server.flush()` first, takes differences of `server.counts()`, looks at
the log from where it begins, and leaves nothing running: others come after it. Only a file that needs other options calls
`one_server.get(NAME, start)` with a name of its own.
"""

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
