"""A trace's arrays, and the form in which the page carries them.

The page opens from one file, so what it carries is small: of a recalled set only the difference to the step before it, of a
token's mass only its level among four, deflated. Sums that a reader sees first (all layers, all heads) are made here from
what the trace has, not from levels. page_data.js unpacks all of it; the formats are in each function's docstring.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any, NamedTuple

import numpy as np

FORMAT, VERSION = "clusterkv-trace", 1
# Weights are on a log scale: 255 is 1, and each step down a factor of 2^(1/8).
TOP, PER_OCTAVE = 255, 8
MAP_PER_OCTAVE = 4
# A level is two octaves: the highest has the tokens with a fourth of the set's largest mass, or more.
LEVELS, LEVEL_STEPS = 4, 16


class Layer(NamedTuple):
    """What one layer recalled, over the steps that were sparse."""

    counts: np.ndarray  # int64 [steps, heads]
    positions: np.ndarray  # int64 [sum of counts], ascending within a step and head
    weights: np.ndarray  # uint8 [sum of counts], as in the trace


class Trace:
    """A trace's arrays, checked against its lengths.

    Args:
        trace: the JSON of docs/explain.md.

    Raises:
        ValueError: it is of another format or version, or an array does not have the length that it must have.
    """

    def __init__(self, trace: dict[str, Any]) -> None:
        if (trace.get("format"), trace.get("version")) != (FORMAT, VERSION):
            found = f"{trace.get('format')!r}, version {trace.get('version')!r}"
            raise ValueError(
                f"this is no trace that the page can show: {found} instead of {FORMAT!r}, version {VERSION}"
            )
        self._trace = trace
        self.prompt_tokens: int = trace["request"]["prompt_tokens"]
        self.tokens: int = self.prompt_tokens + trace["request"]["answer_tokens"]
        self.heads: int = trace["server"]["kv_heads"]
        self.layers: list[int] = trace["server"]["recalling_layers"]
        self.sparse_steps = sum(step["dense"] is None for step in trace["steps"])
        pieces = len(trace["pieces"])
        if pieces != self.tokens:
            raise ValueError(f"the trace has {pieces} pieces of text for {self.tokens} tokens")

    def layer(self, index: int) -> Layer:
        """What `layers[index]` recalled."""
        stream, begins = self._sets("recalled", index)
        counts = stream[begins]
        positions = np.delete(stream, begins)
        if len(positions) and positions.max() >= self.tokens:
            raise ValueError(
                f"layer {self.layers[index]}: it recalled position {positions.max()} of {self.tokens} tokens"
            )
        weights = np.frombuffer(base64.b64decode(self._trace["weights"][index]), np.uint8)
        if len(weights) != len(positions):
            raise ValueError(f"layer {self.layers[index]}: {len(weights)} weights for {len(positions)} positions")
        return Layer(counts.reshape(self.sparse_steps, self.heads), positions, weights)

    @property
    def has_quest(self) -> bool:
        """Whether it tells which pages Quest would have read."""
        return "quest" in self._trace

    def quest(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Of `layers[index]`: int64 [steps * heads], how many pages Quest would have read, and these, ascending in each."""
        stream, begins = self._sets("quest", index)
        return stream[begins], np.delete(stream, begins)

    def _sets(self, name: str, index: int) -> tuple[np.ndarray, list[int]]:
        """A list of sets, each as its size and its members, and where they begin."""
        dtype = "<u2" if self._trace.get("position_bytes", 2) == 2 else "<u4"
        stream = np.frombuffer(base64.b64decode(self._trace[name][index]), dtype).astype(np.int64)
        sets, begins, at = self.sparse_steps * self.heads, [], 0
        for _ in range(sets):
            if at >= len(stream):
                break
            begins.append(at)
            at += 1 + int(stream[at])
        if len(begins) != sets or at != len(stream):
            raise ValueError(f"layer {self.layers[index]}: its {name} positions are not those of {sets} sets")
        return stream, begins

    def masses(self, index: int) -> np.ndarray:
        """float32 [sparse steps, heads, 3]: shares of the base, the recalled and the estimated tokens."""
        return self._array("mass", index, "<f2", (self.sparse_steps, self.heads, 3)).astype(np.float32)

    def clusters(self, index: int) -> np.ndarray:
        """int64 [heads, prompt tokens]: each token's cluster, -1 where it is in none."""
        return self._array("clusters", index, "<i4", (self.heads, self.prompt_tokens)).astype(np.int64)

    def spreads(self, index: int) -> list[np.ndarray]:
        """Per head: float16 by cluster number."""
        return [np.frombuffer(base64.b64decode(head), "<f2") for head in self._trace["cluster_spread"][index]]

    def _array(self, name: str, index: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        flat = np.frombuffer(base64.b64decode(self._trace[name][index]), dtype)
        if len(flat) != math.prod(shape):
            raise ValueError(f"layer {self.layers[index]}: {len(flat)} numbers of {name} instead of {math.prod(shape)}")
        return flat.reshape(shape)


def share_of_weight(weights: np.ndarray) -> np.ndarray:
    """float64: the shares of mass that weights stand for."""
    return np.where(weights == 0, 0.0, np.exp2((weights.astype(np.float64) - TOP) / PER_OCTAVE))


def weight_of_share(shares: np.ndarray, per_octave: int = PER_OCTAVE) -> np.ndarray:
    """uint8: the other way; a share that is not 0 becomes at least 1."""
    logs = np.log2(np.maximum(shares, 1e-300))
    return np.where(shares <= 0, 0, np.clip(np.rint(TOP + per_octave * logs), 1, TOP)).astype(np.uint8)


def text_of(data: bytes) -> str:
    """Deflated (zlib), in base64."""
    return base64.b64encode(zlib.compress(data)).decode()


def planes(values: np.ndarray, width: int) -> bytes:
    """Whole numbers as all their lowest bytes, then all their next ones: high bytes alike deflate to little."""
    return b"".join(((values >> (8 * byte)) & 255).astype(np.uint8).tobytes() for byte in range(width))


def varints(values: np.ndarray) -> bytes:
    """Whole numbers in [0, 2^35), seven bits a byte, the lowest first; the eighth bit says that another byte follows."""
    groups = np.sum([values >> (7 * group) > 0 for group in range(1, 5)], 0) + 1
    ends = np.cumsum(groups)
    out = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for group in range(int(groups.max(initial=0))):
        has = groups > group
        more = (groups[has] > group + 1).astype(np.int64) << 7
        out[ends[has] - groups[has] + group] = (values[has] >> (7 * group)) & 127 | more
    return out.tobytes()


def pack_layer(layer: Layer, tokens: int) -> list[str]:
    """A layer's sets, as three texts.

    Args:
        layer: of the trace.
        tokens: of prompt and answer.

    Returns:
        1. For each step and head a bit per member of that head's last set, ascending, lowest bit first, padded to bytes:
           1 where it has gone. The set before the first is empty.
        2. For each step and head, as varints: how many came, then for each the number of positions between it and the one
           before it.
        3. For each step and head four bytes, the mean weight of each level; then two bits for each member of each set in
           their order, its level, lowest bits first.
    """
    last = [np.zeros(0, np.int64) for _ in range(layer.counts.shape[1])]
    member = np.zeros(tokens, bool)
    gone, came = [], [np.zeros(0, np.int64)]
    counts = layer.counts.reshape(-1)
    for number, end in enumerate(np.cumsum(counts)):
        head, recalled = number % len(last), layer.positions[end - counts[number] : end]
        member[recalled] = True
        gone.append(np.packbits(~member[last[head]], bitorder="little").tobytes())
        member[recalled] = False
        member[last[head]] = True
        new = recalled[~member[recalled]]
        member[last[head]] = False
        came += [np.array([len(new)]), np.diff(new, prepend=-1) - 1]
        last[head] = recalled
    return [text_of(b"".join(gone)), text_of(varints(np.concatenate(came))), text_of(_levels(layer))]


def _levels(layer: Layer) -> bytes:
    counts = layer.counts.reshape(-1)
    of_set = np.repeat(np.arange(len(counts)), counts)
    weights = layer.weights.astype(np.int64)
    largest = np.zeros(len(counts), np.int64)
    np.maximum.at(largest, of_set, weights)
    levels = np.clip(LEVELS - 1 - (largest[of_set] - weights) // LEVEL_STEPS, 0, LEVELS - 1)
    bins, size = of_set * LEVELS + levels, len(counts) * LEVELS
    total = np.bincount(bins, share_of_weight(layer.weights), size)
    means = weight_of_share(total / np.maximum(1, np.bincount(bins, minlength=size)))
    padded = np.pad(levels, (0, -len(levels) % 4)).reshape(-1, 4)
    return means.tobytes() + (padded << np.arange(0, 8, 2)).sum(1).astype(np.uint8).tobytes()


def pack_quest(counts: np.ndarray, pages: np.ndarray) -> str:
    """Sets of pages (`Trace.quest`) as varints: of each how many, then the distances between them."""
    ends = np.cumsum(counts)
    parts = [np.zeros(0, np.int64)]
    for end, count in zip(ends, counts, strict=True):
        parts += [np.array([count]), np.diff(pages[end - count : end], prepend=-1) - 1]
    return text_of(varints(np.concatenate(parts)))


class Sums(NamedTuple):
    """What the page shows before it unpacks a layer."""

    counts: np.ndarray  # int64 [recalling layers, tokens]: how often each was recalled, over steps and heads
    mass: np.ndarray  # float64 [sparse steps, tokens]: its share of a step, mean over layers and heads


def sums(trace: Trace, layers: list[Layer]) -> Sums:
    """Counts and masses over all heads."""
    counts = np.stack([np.bincount(layer.positions, minlength=trace.tokens) for layer in layers])
    mass = np.zeros(trace.sparse_steps * trace.tokens)
    for layer in layers:
        step = np.repeat(np.arange(trace.sparse_steps), layer.counts.sum(1))
        places = step * trace.tokens + layer.positions
        mass += np.bincount(places, share_of_weight(layer.weights), len(mass))
    return Sums(counts, mass.reshape(trace.sparse_steps, trace.tokens) / (len(layers) * trace.heads))
