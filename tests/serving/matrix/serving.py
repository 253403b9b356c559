"""Serves architectures one after the other, each through sgl.Engine, from one process that imports SGLang once.

A start costs mostly imports, three times. So this process imports what an engine and its scheduler need, and each architecture
is served by a fork of it, whose own processes are forks too: SGLang's request for spawned ones is passed over. What a fork
printed is in a file beside its result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from tests.serving.matrix import tiny
from tests.serving.matrix.architectures import VOCABULARY, Architecture

PAGE = 16
CONFIG = {
    "budget_tokens": 384,
    "candidate_tokens": 4096,
    "segment_tokens": 256,
    "recluster_every": 64,
    "dense_below_tokens": 0,
}
SHORT, LONG = 320, 592  # tokens of a prompt whose clusters fit the budget, and of one where they do not
SHARED = 400  # tokens that another prompt has in common with the long one
ANSWER = 10
TIMEOUT_S = 400


def prompt(number: int, tokens: int) -> list[int]:
    """Ids of a text that no other number has."""
    generator = random.Random(number)
    return [generator.randrange(3, VOCABULARY) for _ in range(tokens)]


class Served:
    """An engine, asked for what the matrix wants to know."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def counts(self) -> dict[str, Any]:
        """The plugin's counts, once two readings agree."""
        counts = None
        while (newer := self.engine.get_server_info()["internal_states"][0]["clusterkv"]) != counts:
            counts = newer
            time.sleep(0.2)
        return counts

    def generate(self, ids: Any, tokens: int, **fields: Any) -> Any:
        """A greedy answer with the log-probabilities of its tokens; of a list of prompts a list, decoded together."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return self.engine.generate(input_ids=ids, sampling_params=sampling, return_logprob=True, **fields)

    def off(self, ids: list[int]) -> float:
        """How far the log-probabilities of an answer's tokens are from those of a prefill of the same text, at most.

        The prefill attends to everything, exactly, by a kernel of its own; it has to take the answer's tokens anew.
        """
        answer = self.generate(ids, ANSWER)
        tokens = answer["output_ids"]
        decoded = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        again = self.generate(ids + tokens, 1, logprob_start_len=len(ids) - 1)
        entries = again["meta_info"]["input_token_logprobs"][-len(tokens) :]
        assert [entry[1] for entry in entries] == tokens
        return max(abs(one - entry[0]) for one, entry in zip(decoded, entries, strict=True))


def ask(served: Served) -> dict[str, Any]:
    """Prompts below and above the budget, and one that shares a prefix."""
    short = served.off(prompt(1, SHORT))
    after_short = served.counts()
    long = served.off(prompt(2, LONG))
    after_long = served.counts()
    served.generate(prompt(2, LONG)[:SHARED] + prompt(3, 200), 2)
    end = served.counts()
    served.generate([prompt(2, LONG), prompt(4, SHORT)], 4)
    return {
        "short_off": short,
        "long_off": long,
        "clustered_layers": end["clustered_layers"],
        "recalled_mass": end["recalled_mass"],
        "dense_layer_calls": sorted(end["dense_layer_calls"]),
        "dense_steps": sorted(end["dense_steps"]),
        "sparse_before_long": after_short["sparse_steps"],
        "sparse_steps": after_long["sparse_steps"],
        "clustered_again": end["tokens_clustered"] - after_long["tokens_clustered"],
        "reused": end["tokens_reused"] - after_long["tokens_reused"],
        "faults": end["faults"],
        "build_conflicts": end["build_conflicts"],
    }


class Asked(NamedTuple):
    """What is done to an engine, and how it is started beside what the architecture needs."""

    ask: Callable[[Served], dict[str, Any]] = ask
    arguments: dict[str, Any] = {}
    config: dict[str, Any] = {}


def serve(architecture: Architecture, folder: Path, asked: Asked) -> dict[str, Any]:
    """Make the model, start the engine, ask; or why that ended."""
    import sglang as sgl

    from sglang_clusterkv.config import ConfigError
    from tests.support import twice

    model = folder / "model"
    tiny.make(architecture, model)
    twice.watch(folder / "twice")
    arguments: dict[str, Any] = {
        "model_path": str(model), "attention_backend": "clusterkv", "device": "cpu", "dtype": "float32",
        "max_total_tokens": 2048, "max_running_requests": 2, "chunked_prefill_size": 512, "skip_tokenizer_init": True,
        "random_seed": 1, "sleep_on_idle": True,
    }  # fmt: skip
    try:
        engine = sgl.Engine(**(arguments | architecture.arguments | asked.arguments))
    except ConfigError as error:
        return {"outcome": "refused", "reason": str(error)}
    try:
        return {"outcome": "works"} | asked.ask(Served(engine)) | {"twice": twice.told(folder / "twice")}
    finally:
        engine.shutdown()


def _fork(architecture: Architecture, folder: Path, asked: Asked) -> None:
    """What a fork does; never returns."""
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["SGLANG_CLUSTERKV_CONFIG"] = json.dumps(CONFIG | asked.config)
    code = 1
    try:
        with patch.object(multiprocessing, "set_start_method", lambda *_, **__: None):
            result = serve(architecture, folder, asked)
        (folder / "result.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(architecture: Architecture, folder: Path, asked: Asked | None = None) -> dict[str, Any]:
    """Serve one architecture in a fork of this process; its result, `reason` being the first error where it ended."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        _fork(architecture, folder, asked or Asked())
    ends = time.monotonic() + TIMEOUT_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > ends:
            break
        time.sleep(0.1)
    try:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    return {"outcome": "not startable", "reason": first_error((folder / "log").read_text())}


def first_error(log: str) -> str:
    """The error that a log tells first, the last of a chain of handled ones: what follows it mostly comes of it."""
    found, chained = None, True
    for line in log.splitlines():
        if line.startswith(("During handling of the above", "The above exception was")):
            chained = True
        text = line.partition("] ")[2] if line.startswith("[") else line
        name, colon, rest = text.partition(": ")
        if chained and colon and name.replace(".", "").isidentifier() and name.endswith(("Error", "Exception")):
            found, chained = f"{name}: {rest}", False
    return found or "it ended without a word"


def imports() -> None:
    """Import what an engine and its processes need, before any fork."""
    import sglang as sgl  # noqa: F401
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.managers.tp_worker
    import sglang.srt.models.registry  # noqa: F401
    import transformers  # noqa: F401

    from sglang_clusterkv.serving import backend, sglang_differences  # noqa: F401
    from tests.support import twice  # noqa: F401

    sglang_differences.check()  # it remembers what it read of SGLang's source


def main() -> None:
    """FOLDER NAME[@TP]...: serve these, one JSON line each."""
    from tests.serving.matrix.architectures import BY_NAME

    imports()
    folder = Path(sys.argv[1])
    for number, name in enumerate(sys.argv[2:]):
        name, _, ranks = name.partition("@")
        begin = time.monotonic()
        result = run(BY_NAME[name], folder / str(number), Asked(arguments={"tp_size": int(ranks or 1)}))
        result["took_s"] = round(time.monotonic() - begin, 1)
        print(json.dumps({"name": name} | result), flush=True)


if __name__ == "__main__":
    main()
