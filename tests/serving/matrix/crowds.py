"""Crowds of one to nine requests at once, by engines with other options than the matrix's; each decode step is run both ways.

python -m tests.serving.matrix.crowds FOLDER [NAME...]
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

from tests.serving.matrix import serving
from tests.serving.matrix.architectures import BY_NAME

LARGEST = 9  # one more than a step of our layers takes
_ROOM = {"max_total_tokens": 8192, "max_running_requests": LARGEST, "chunked_prefill_size": 256}
_LLAMA, _PHI = "Llama 3.1, 3.2, 3.3", "Phi-3 mini"  # the latter has a sliding window, which SGLang does not use
# Architecture, arguments of sgl.Engine, and our options.
CROWDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (_LLAMA, {}, {}),
    "hidden states": ("Qwen 2.5", {"enable_return_hidden_states": True, "page_size": 8}, {}),
    "without a radix cache": (_PHI, {"disable_radix_cache": True, "page_size": 32}, {"recluster_every": 128}),
    "little room": (_LLAMA, {"max_total_tokens": 1536, "schedule_conservativeness": 0.05}, {}),
    "two ranks": (_LLAMA, {"tp_size": 2}, {}),
    "a host tier": (
        _LLAMA,
        {"max_total_tokens": 6144, "chunked_prefill_size": 512},
        {"host_ratio": 3.0, "window_tokens": 32},
    ),
    "traces that nobody asks for": ("Qwen 3", {}, {"trace": True}),
}


def ask(served: serving.Served, hidden_states: bool) -> dict[str, Any]:
    """Requests of all kinds, of which some begin while others decode."""
    generator = random.Random(1)
    shared = serving.prompt(99, 400)

    async def one(number: int) -> int:
        await asyncio.sleep(generator.choice([0, 0, 0.05, 0.3]))
        ids = shared[: generator.choice([0, 160, 400])] + serving.prompt(number, generator.choice([5, 40, 300, 500]))
        sampling = {"temperature": 0, "max_new_tokens": generator.randrange(3, 12), "ignore_eos": True}
        more: list[dict[str, Any]] = [
            {}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2},
            {"logit_bias": {"5": 2.0}},
        ]  # fmt: skip
        wanted: list[dict[str, Any]] = [{}, {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [5]}]
        if hidden_states:
            wanted.append({"return_hidden_states": True})
        answer = await served.engine.async_generate(
            input_ids=ids, sampling_params=sampling | generator.choice(more), **generator.choice(wanted)
        )
        assert len(answer["output_ids"]) == sampling["max_new_tokens"]
        return 1

    async def all_of_them() -> int:
        done = 0
        for size in range(1, LARGEST + 1):
            done += sum(await asyncio.gather(*[one(100 * size + i) for i in range(size)]))
        return done

    answers = served.engine.loop.run_until_complete(all_of_them())
    counts = served.counts()
    told = {"answers": answers, "faults": counts["faults"], "sparse_steps": counts["sparse_steps"]}
    return told | {"from_host": counts.get("host_tier", {}).get("recalled_rows_host", 0)}


def main() -> None:
    """One JSON line each."""
    serving.imports()
    folder = Path(sys.argv[1])
    for number, name in enumerate(sys.argv[2:] or CROWDS):
        architecture, arguments, config = CROWDS[name]
        hidden_states = "enable_return_hidden_states" in arguments
        asked = serving.Asked(lambda served, hidden=hidden_states: ask(served, hidden), _ROOM | arguments, config)  # type: ignore[misc]
        print(json.dumps({"name": name} | serving.run(BY_NAME[architecture], folder / str(number), asked)), flush=True)


if __name__ == "__main__":
    main()
