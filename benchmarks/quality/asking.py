"""Ask one running server the same questions under several attention policies, one after the other over one prefill.

Prefill is dense and exact under every policy, so a prompt that the radix cache holds is the same for all. What a policy
decodes is cached behind the prompt, where the next policy's request, which ends with the prompt, does not look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.forced import FLAGS
from benchmarks.policies.control import use
from benchmarks.quality.model_level import Arm, options_of
from benchmarks.quality.scores import DENSE
from benchmarks.servers import Server

# An idle server would take a core from whoever makes the next prompt.
SERVER_FLAGS = [*FLAGS, "--page-size", "16", "--sleep-on-idle", "--watchdog-timeout", "3600"]
TOGETHER = 4  # prompts that are asked for at once under every arm, before the next


class ForcedQuestion(CustomLogitProcessor):
    """Runs in the scheduler: a request decodes the ids `question` of its `custom_params`, then what it likes."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Force the rows of one step whose question is not over; [requests, vocabulary]. `forced.ForcedText` has the why."""
        for row, params in zip(logits, custom_param_list or [], strict=True):
            request = params["__req__"]
            if request.extend_end < len(request.full_untruncated_fill_ids):
                continue  # a chunk of the prompt that is not its last
            step = params.get("step", 0)
            params["step"] = step + 1
            if step < len(params["question"]):
                row.fill_(-torch.inf)
                row[params["question"][step]] = 0.0
        return logits


def arms_of(policies: Sequence[str], budgets: Sequence[int], candidates: int | None = None) -> list[Arm]:
    """Dense, then every policy at every budget.

    Args:
        policies: of `benchmarks.policies.POLICIES`.
        budgets: tokens.
        candidates: `candidate_tokens` of all; None: as the model-level evaluation has them.
    """
    chosen = {} if candidates is None else {"candidate_tokens": candidates}
    return [Arm(DENSE, DENSE, {})] + [
        Arm(f"{policy} {budget}", policy, options_of(budget) | chosen) for policy in policies for budget in budgets
    ]


def ask(server: Server, document: list[int], question: list[int], tokens: int, end: int, decoded: bool) -> list[int]:
    """Greedy answer to a question behind a document, under the policy in use.

    Args:
        server: started with `SERVER_FLAGS`.
        document: ids.
        question: ids.
        tokens: most that are decoded.
        end: id of the end of text.
        decoded: the question goes through decode steps; else it is prefilled, densely.

    Returns:
        Ids, without an end of text.
    """
    if decoded:
        # A template's end of turn inside the question must not end the request, so the answer is cut here instead.
        sampling = {
            "max_new_tokens": len(question) + tokens,
            "ignore_eos": True,
            "custom_params": {"question": question},
        }
        fields = {"custom_logit_processor": ForcedQuestion.to_str()}
        found = server.generate(document, 0, sampling_params={"temperature": 0, **sampling}, **fields)["output_ids"]
        assert found[: len(question)] == question, "the question was not decoded as given: was the request retracted?"
        ids = found[len(question) :]
    else:
        sampling = {"temperature": 0, "max_new_tokens": tokens}
        ids = server.generate(document + question, 0, sampling_params=sampling)["output_ids"]
    return ids[: ids.index(end)] if end in ids else ids


class Steps:
    """Decode steps by arm: all, and those in which a policy chose what to read."""

    def __init__(self) -> None:
        self.all: Counter[str] = Counter()
        self.sparse: Counter[str] = Counter()

    @contextmanager
    def count(self, server: Server, arm: Arm) -> Iterator[None]:
        """Count what the server decodes in the block as the arm's; AssertionError where a step of dense was sparse."""
        before = server.counts()
        yield
        after = server.counts()
        sparse = after["sparse_steps"] - before["sparse_steps"]
        assert arm.policy != DENSE or not sparse, f"{sparse} steps of dense were sparse"
        self.sparse[arm.name] += sparse
        self.all[arm.name] += sparse + sum(after["dense_steps"].values()) - sum(before["dense_steps"].values())

    def shares(self) -> dict[str, float]:
        """Share of each arm's decode steps that were sparse."""
        return {arm: self.sparse[arm] / max(1, steps) for arm, steps in self.all.items()}


def prefill(server: Server, *documents: list[int]) -> None:
    """Bring documents into the empty radix cache, clustered, and cut where a prompt ends: alike for every arm from then on."""
    server.flush()
    use(server, DENSE)
    for document in documents:
        for _ in range(2):
            server.generate(document, 2)  # a decode step, at whose head it is clustered
