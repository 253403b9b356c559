"""What a traced request's steps read, as the host keeps it until the answer ends, and the bytes that a trace is made of.

docs/explain.md has the format. Everything is told by position in the request: no slot, page or other request shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.trace.packed_cpu import put_segment, put_step
from sglang_clusterkv.kernels.trace.quest import PageBounds

FORMAT = "clusterkv-trace"
VERSION = 1


class StepRead(NamedTuple):
    """What a sparse step read in its layers; tensors on the host, written asynchronously. L layers, H kv heads."""

    layers: tuple[int, ...]  # counted from this rank's first
    positions: torch.Tensor  # int32 [L, H, R], ascending; beyond the count the largest int32
    count: torch.Tensor  # int32 [L, H]
    weights: torch.Tensor  # uint8 [L, H, R], levels (kernels/trace/reference.py)
    mass: torch.Tensor  # float16 [L, H, 3]: shares of base, recalled, rest
    quest: torch.Tensor | None = None  # int32 [L, H, P], ascending: numbers of the pages that Quest would read


class Step:
    """A decode step of a traced request.

    Attributes:
        token: position of its query.
        dense: why it was dense; None: it was sparse.
        base: position ranges [begin, end) that were always attended.
        clustered: tokens that could be recalled.
        segments: that they lay in.
        read: what was recalled; None until it is known, and where the step was dense.
    """

    def __init__(
        self, token: int, dense: str | None, base: list[tuple[int, int]], clustered: int, segments: int
    ) -> None:
        self.token = token
        self.dense = dense
        self.base = base
        self.clustered = clustered
        self.segments = segments
        self.read: StepRead | None = None

    @property
    def base_tokens(self) -> int:
        """How many were always attended."""
        return sum(end - begin for begin, end in self.base)


class SegmentClusters(NamedTuple):
    """A segment's clusters in the layers that have any, on the host; M tokens, C clusters."""

    begin: int  # position of its first token
    members: torch.Tensor  # int16 [L, M, H], offsets in the segment, sorted by cluster
    ends: torch.Tensor  # int16 [L, C, H], end of the cluster in `members`
    spread: torch.Tensor  # bf16 [L, C, H]


class Trace:
    """The newest steps of one request.

    Args:
        most_steps: how many are kept.
        quest: whether it tells what Quest would have read.
    """

    def __init__(self, most_steps: int, quest: bool = False) -> None:
        self.steps: deque[Step] = deque(maxlen=most_steps)
        self.bounds: dict[int, PageBounds] | None = {} if quest else None  # by layer
        self.segments: dict[int, SegmentClusters] = {}  # by id
        self.seen: tuple[int, ...] = ()  # ids of those that the last sparse step could recall from
        self.refused: str | None = None  # why nothing was kept, in a sentence
        self._added = 0

    def add(self, step: Step) -> None:
        """A step is launched; one at or behind its position was in vain."""
        while self.steps and self.steps[-1].token >= step.token:
            self.steps.pop()
            self._added -= 1
        self.steps.append(step)
        self._added += 1

    def until(self, token: int) -> tuple[list[Step], int]:
        """The steps kept whose query lies before a position, and how many others there were before it."""
        kept = [step for step in self.steps if step.token < token and (step.dense or step.read)]
        in_vain = sum(step.token >= token for step in self.steps)
        return kept, self._added - in_vain - len(kept)


def recalled_bytes(reads: list[StepRead], position_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """For each layer, step and kv head: how many positions were recalled and these, little-endian; and their weights alone.

    Args:
        reads: of the sparse steps, all of the same layers.
        position_bytes: of a count or position, 2 or 4.
    """
    if not reads:
        return [], []
    halves = position_bytes // 2
    heads = reads[0].count.shape[1]
    recalled = sum(read.count.sum(1, dtype=torch.int64) for read in reads)
    assert isinstance(recalled, torch.Tensor)
    weights_end = recalled.cumsum(0).numpy()
    listed_end = halves * (recalled + len(reads) * heads).cumsum(0).numpy()
    listed, weights = np.empty(listed_end[-1], np.uint16), np.empty(weights_end[-1], np.uint8)
    listed_at, weights_at = (np.append(0, ends[:-1]) for ends in (listed_end, weights_end))
    begins = listed_at.tolist(), weights_at.tolist()
    for read in reads:
        positions, count, levels = read.positions.numpy(), read.count.numpy(), read.weights.numpy()
        put_step(positions, count, levels, halves, listed, listed_at, weights, weights_at)
    parts = ((listed, begins[0], listed_at), (weights, begins[1], weights_at))
    found, weight = (
        [array[begin:end].tobytes() for begin, end in zip(first, last.tolist(), strict=True)]
        for array, first, last in parts
    )
    return found, weight


def mass_bytes(reads: list[StepRead]) -> list[bytes]:
    """For each layer float16 [sparse steps, H, 3]."""
    return [layer.tobytes() for layer in torch.stack([read.mass for read in reads], 1).numpy()] if reads else []


def quest_bytes(reads: list[StepRead], layer: int, dtype: str) -> bytes:
    """For each step and kv head: how many pages Quest would read, then their numbers.

    Args:
        reads: of the sparse steps.
        layer: place in `StepRead.layers`.
        dtype: little-endian, of counts and numbers.
    """
    listed = []
    for read in reads:
        assert read.quest is not None
        numbers = read.quest[layer].numpy()
        listed.append(np.pad(numbers, ((0, 0), (1, 0)), constant_values=numbers.shape[1]).astype(dtype))
    return b"".join(part.tobytes() for part in listed)


def clusters_of(segments: list[SegmentClusters], rows: list[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Which cluster each of a request's first tokens is in, and each cluster's spread.

    Args:
        segments: in sequence order; their clusters are numbered one after the other.
        rows: places of the layers in `SegmentClusters`.
        tokens: of the prompt.

    Returns:
        int32 [layers, H, tokens], -1: in none; and float16 [layers, H, clusters].
    """
    if not segments:
        return np.empty((len(rows), 0, tokens), np.int32), np.empty((len(rows), 0, 0), np.float16)
    layers = np.array(rows, np.int64)
    numbers, first = np.full((len(rows), segments[0].members.shape[2], tokens), -1, np.int32), 0
    for segment in segments:
        put_segment(segment.members.numpy(), segment.ends.numpy(), layers, segment.begin, first, numbers)
        first += segment.ends.shape[1]
    spread = torch.cat([segment.spread for segment in segments], 1)[rows].float().numpy().astype(np.float16)
    return numbers, spread.transpose(0, 2, 1)


def document(
    trace: Trace,
    *,
    prompt: list[int],
    answer: list[int],
    server: dict[str, Any],
    request: dict[str, Any],
    step_bytes: Callable[[Step, int], tuple[int, int]],
    row_of: Mapping[int, int],
    encode: Callable[[bytes], str],
) -> dict[str, Any]:
    """A trace as docs/explain.md has it.

    Args:
        trace: whose steps have all run, and their copies to the host too.
        prompt: token ids.
        answer: token ids.
        server: what is said of the server.
        request: what is said of the request, beside its lengths.
        step_bytes: of a step and how many layers recall, -> bytes read, and those that a dense step would read.
        row_of: place of a layer in `SegmentClusters`, by its number.
        encode: bytes -> base64 text.
    """
    tokens = len(prompt) + len(answer)
    steps, dropped = trace.until(tokens - 1)
    reads = [step.read for step in steps if step.read is not None]
    layers = reads[0].layers if reads else ()
    position_bytes = 2 if tokens <= 1 << 16 else 4
    places = range(len(layers))
    segments = [trace.segments[id_] for id_ in trace.seen if id_ in trace.segments]
    numbers, spread = clusters_of(segments, [row_of[layer] for layer in layers], len(prompt))
    recalled, weights = recalled_bytes(reads, position_bytes)
    dtype = f"<u{position_bytes}"
    quest = {} if trace.bounds is None else {"quest": [encode(quest_bytes(reads, place, dtype)) for place in places]}
    return {
        "format": FORMAT,
        "version": VERSION,
        "server": server | {"recalling_layers": list(layers)},
        "request": request | {"prompt_tokens": len(prompt), "answer_tokens": len(answer), "dropped_steps": dropped},
        "position_bytes": position_bytes,
        "token_ids": [*prompt, *answer],
        "steps": [_step_entry(step, *step_bytes(step, len(layers))) for step in steps],
        "recalled": [encode(layer) for layer in recalled],
        "mass": [encode(layer) for layer in mass_bytes(reads)],
        "weights": [encode(layer) for layer in weights],
        "clusters": [encode(layer.tobytes()) for layer in numbers],
        "cluster_spread": [[encode(head.tobytes()) for head in layer] for layer in spread],
        **quest,
    }


def _step_entry(step: Step, bytes_read: int, bytes_dense: int) -> dict[str, Any]:
    return {
        "token": step.token,
        "dense": step.dense,
        "base": [list(part) for part in step.base],
        "clustered": step.clustered,
        "bytes_read": bytes_read,
        "bytes_dense": bytes_dense,
    }
