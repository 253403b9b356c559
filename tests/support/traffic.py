"""Traffic for tests of a real server: prompts, requests that are watched while they run, and what the log says of them."""

from __future__ import annotations

import ast
import contextlib
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from benchmarks.servers import MOST_READ, Server

PAGE = 16
# Prompts of 960 tokens leave 864 in segments. The budget leaves out the lightest tenth, so that rows decode sparsely and
# yet the tiny model's logits stay within 0.03 % of their spread (median): answers are those of the dense way, wherever
# borders are. One of ten tokens left out blindly, or read from a wrong page, changes them within a few steps.
CONFIG = {
    "budget_tokens": 768,
    "candidate_tokens": 4096,
    "segment_tokens": 256,
    "recluster_every": 64,
    "trace": True,
    "trace_tokens": 40,
}


def prompt(number: int, tokens: int = 960) -> list[int]:
    """Ids of a text that no other number shares a page with."""
    generator = random.Random(number)
    return [generator.randrange(3, 49152) for _ in range(tokens)]


def logging_of_requests(folder: Path) -> dict[str, str]:
    """Variables for a server that logs, by process, the segments of each request at its end.

    `--log-level debug` would do so too, among megabytes of numba's.
    """
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "[%(asctime)s %(process)d] %(levelname)s %(message)s"}},
        "handlers": {"stream": {"class": "logging.StreamHandler", "formatter": "plain"}},
        "root": {"level": "INFO", "handlers": ["stream"]},
        "loggers": {"sglang_clusterkv.clusters.engine": {"level": "DEBUG"}},
    }
    path = folder / "logging.json"
    path.write_text(json.dumps(config))
    return {"SGLANG_LOGGING_CONFIG_PATH": str(path)}


def wait_until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s in vain"
        time.sleep(0.01)
    return value


def borders(server: Server, rid: str, ranks: int = 1) -> list[list[tuple[int, int]]]:
    """The segments that a finished request saw at its end, as each rank's log tells."""
    line = re.compile(rf" (\d+)\] DEBUG clusterkv: request {rid}: \d+ tokens, segments (.*)")

    def told() -> list[list[tuple[int, int]]]:
        # A retracted request ends more than once: its last line counts.
        of_rank = {process: ast.literal_eval(text) for process, text in line.findall(server.log.read_text())}
        return list(of_rank.values()) if len(of_rank) == ranks else []

    return wait_until(told)


def grew(before: dict[str, Any], after: dict[str, Any], name: str, reason: str = "") -> int:
    """How much one of our counters rose, or one reason of it."""
    if reason:
        return after[name].get(reason, 0) - before[name].get(reason, 0)
    return after[name] - before[name]


class Request:
    """A greedy request in a thread of its own, whose tokens are seen as they come.

    Args:
        server: that gets it.
        ids: of the prompt.
        tokens: to generate.
        sampling: more of its sampling parameters.
    """

    def __init__(self, server: Server, ids: list[int], tokens: int, **sampling: Any) -> None:
        self.rid = uuid.uuid4().hex
        self.ids, self.tokens = ids, tokens
        self.output_ids: list[int] = []
        self.meta: dict[str, Any] = {}
        self.status = 0
        self._server = server
        self._sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} | sampling
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        body: dict[str, Any] = {
            "input_ids": self.ids,
            "sampling_params": self._sampling,
            "stream": True,
            "rid": self.rid,
        }
        with (
            contextlib.suppress(requests.RequestException),  # a killed server; `status` stays 0
            requests.post(f"{self._server.url}/generate", json=body, stream=True, timeout=600) as answer,
        ):
            for line in answer.iter_lines(chunk_size=MOST_READ):
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    event = json.loads(line[5:])
                    self.output_ids = event.get("output_ids", self.output_ids)
                    self.meta = event.get("meta_info", self.meta)
            self.status = answer.status_code

    @property
    def running(self) -> bool:
        """Whether the answer is still coming."""
        return self._thread.is_alive()

    def wait_for(self, tokens: int) -> None:
        """Until so many tokens have come, and the request still runs."""
        wait_until(lambda: len(self.output_ids) >= tokens or not self.running)
        assert self.running, f"it ended with {len(self.output_ids)} tokens: {self.meta}"

    def abort(self) -> None:
        """Tell the server to stop it."""
        requests.post(f"{self._server.url}/abort_request", json={"rid": self.rid}, timeout=60)

    def join(self) -> None:
        """Until it has ended, in whatever way."""
        self._thread.join(600)

    def result(self) -> list[int]:
        """All its tokens, once it has ended."""
        self.join()
        assert not self.running and self.status == 200
        return self.output_ids

    @property
    def was_aborted(self) -> bool:
        """Whether it ended by an abort."""
        return (self.meta.get("finish_reason") or {}).get("type") == "abort"


def alone(server: Server, ids: list[int], tokens: int) -> list[int]:
    """The answer of an idle server that remembers nothing."""
    server.flush()
    return server.generate(ids, tokens)["output_ids"]


def at_once(server: Server, prompts: list[list[int]], tokens: int, *, ignore_eos: bool = True) -> list[dict[str, Any]]:
    """Several requests that reach the scheduler together."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": ignore_eos}
    answer = requests.post(
        f"{server.url}/generate", json={"input_ids": prompts, "sampling_params": sampling}, timeout=600
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_well(server: Server) -> None:
    """Nothing runs, nothing went wrong, and SGLang's strict check of its pools, made when idle, did not end the server."""
    counts = wait_until(lambda: (c := server.counts())["running"] == 0 and c)
    assert counts["build_conflicts"] == 0 and not counts["faults"], counts
    server.flush()
    log = server.log.read_text()
    assert "Traceback" not in log and "leak" not in log.lower(), log[-3000:]
    assert server.process.poll() is None
