"""A refusal that a scheduler process finds: it ends the start with its sentence alone, as one on a command line does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sglang_clusterkv.config import ConfigError


@contextmanager
def sentence_alone() -> Iterator[None]:
    """End this process and its server, where a ConfigError is raised in here; pass it on where there is no server above.

    SGLang would print the scheduler's traceback first. The server is told as SGLang's schedulers tell that they failed.
    """
    try:
        yield
    except ConfigError as error:
        server = multiprocessing.parent_process()
        if server is None or server.pid is None:
            raise
        print(f"sglang-clusterkv: {error}", file=sys.stderr, flush=True)
        with suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGQUIT)
        raise SystemExit(1) from None
