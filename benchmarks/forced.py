"""Decode a given text through a real server and read every step's log-probabilities: what an approximation costs, by KL.

A server started with `FLAGS` runs `ForcedText` on the logits of each step. It writes their log-softmax to a file and then
leaves one token to choose, that of the given text. So every server that is compared decodes the very same text, one token per
step, through its real decode path, radix cache included; what differs is only what the attention made of the context.

Limits:

- The first row of an answer is the last position of the prefill. Prefill is dense and exact in every server, so that row says
  nothing of sparse decode: leave it out of a mean (`decoded`).
- What a sparse step wrote to the KV cache stays there. In a chat the next turn finds it, as it does in use, so later turns are
  compared with their drift, the first row included.
- One scheduler process: with tensor parallelism each rank would write the same file. Server and client share a file system.
- SGLang pickles the processor by its name, so the server must be able to import `benchmarks`: start it in the repository's
  root, as `benchmarks.servers.serve` does for whoever runs there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.servers import Server

FLAGS = ["--enable-custom-logit-processor"]


class ForcedText(CustomLogitProcessor):
    """Runs in the scheduler. `custom_params`: `answer`, ids to force, and `file`, where log-probabilities are appended."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Write and force the rows of one step.

        Args:
            logits: float32 [requests, vocabulary], before any temperature.
            custom_param_list: one dictionary per row. SGLang copies it once per request and adds the request as `__req__`, so
                it also counts the request's steps: `output_ids` lags behind a step with overlap scheduling, and the same
                text may be asked for twice at once.
        """
        for row, params in zip(logits, custom_param_list or [], strict=True):
            request = params["__req__"]
            # A prompt in chunks is sampled after each of them, and all but the last token are thrown away.
            if request.extend_end < len(request.full_untruncated_fill_ids):
                continue
            step = params.get("step", 0)
            params["step"] = step + 1
            # With overlap scheduling one step more than asked for may be under way when the request ends.
            if step >= len(params["answer"]):
                continue
            with Path(params["file"]).open("ab") as file:
                # float64: a float32 sum over the vocabulary is off by 2e-5, as much as a small KL.
                torch.log_softmax(row.double(), dim=-1).float().cpu().numpy().tofile(file)
            row.fill_(-torch.inf)
            row[params["answer"][step]] = 0.0
        return logits


def forced_decode(server: Server, prompt_ids: list[int], answer_ids: list[int]) -> np.ndarray:
    """Log-probabilities of every step while the server decodes `answer_ids` after `prompt_ids`.

    Args:
        server: started with `FLAGS`.
        prompt_ids: token ids; what the radix cache knows of them is not computed again.
        answer_ids: token ids, one or more; an end-of-text token among them ends nothing.

    Returns:
        float32 [len(answer_ids), vocabulary]: row i was computed from the prompt and answer_ids[:i] and predicts answer_ids[i].
        Row 0 comes from the prefill.

    Raises AssertionError if the server produced other tokens or another number of rows, as after a retraction.
    """
    with tempfile.TemporaryDirectory(prefix="forced-") as folder:
        file = Path(folder) / "rows.float32"
        sampling = {
            "temperature": 0,
            "max_new_tokens": len(answer_ids),
            "ignore_eos": True,
            "custom_params": {"answer": answer_ids, "file": str(file)},
        }
        found = server.generate(
            prompt_ids, len(answer_ids), sampling_params=sampling, custom_logit_processor=ForcedText.to_str()
        )
        assert found["output_ids"] == answer_ids, f"forced {answer_ids}, but the server produced {found['output_ids']}"
        rows = np.fromfile(file, dtype=np.float32)
    assert rows.size % len(answer_ids) == 0, f"{rows.size} values for {len(answer_ids)} tokens"
    return rows.reshape(len(answer_ids), -1)


def decoded(rows: np.ndarray) -> np.ndarray:
    """Without the first: the rows of an answer that came from decode steps."""
    return rows[1:]


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each row of log-probabilities [n, vocabulary], in nats: float64 [n]."""
    found = np.empty(len(reference))
    for i, (p, q) in enumerate(zip(reference.astype(np.float64), other.astype(np.float64), strict=True)):
        found[i] = np.sum(np.exp(p) * (p - q))
    return found


def mean(groups: Sequence[ArrayLike]) -> float:
    """Over the values of all groups together."""
    return float(np.mean(np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])))


def parts_of(documents: Sequence[ArrayLike], tokens: int) -> list[np.ndarray]:
    """Values of each document in parts of about so many tokens, for a bootstrap over the parts."""
    values = [np.asarray(document, dtype=np.float64) for document in documents]
    return [part for document in values for part in np.array_split(document, max(1, len(document) // tokens))]


def interval(groups: Sequence[ArrayLike]) -> tuple[float, float]:
    """95 % of that mean, by bootstrap over the groups: values of one turn or document are not independent of each other."""
    sums, counts = np.array([np.sum(group) for group in groups]), np.array([np.size(group) for group in groups])
    picks = np.random.default_rng(7).integers(len(groups), size=(10_000, len(groups)))
    low, high = np.quantile(sums[picks].sum(1) / counts[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


class Ratio(NamedTuple):
    """One mean over another of the same tokens, and 95 % of it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired_ratio(over: Sequence[ArrayLike], under: Sequence[ArrayLike], tokens: int) -> Ratio:
    """Mean of `over` over that of `under`, by bootstrap over parts of so many tokens; a list per document, both alike."""
    sums = [np.array([part.sum() for part in parts_of(values, tokens)]) for values in (over, under)]
    picks = np.random.default_rng(7).integers(len(sums[0]), size=(10_000, len(sums[0])))
    low, high = np.quantile(sums[0][picks].sum(1) / sums[1][picks].sum(1), [0.025, 0.975])
    return Ratio(float(sums[0].sum() / sums[1].sum()), float(low), float(high))
