"""Traces for tests: a reader of their format, by docs/explain.md, and a world whose layers run and are traced."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.trace import Trace
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import cpu
from tests.support.world import CONTENTS, Request, World

SCALE = 0.3


class ReadStep(NamedTuple):
    """A sparse step of a trace; by layer of `recalling_layers` and kv head."""

    token: int
    positions: list[list[np.ndarray]]  # int64, ascending
    shares: list[list[np.ndarray]]  # float64, of the step's mass
    mass: np.ndarray  # float64 [layers, heads, 3]


def read_trace(trace: dict[str, Any]) -> list[ReadStep]:
    """The sparse steps of a trace."""
    heads = trace["server"]["kv_heads"]
    sparse = [step for step in trace["steps"] if step["dense"] is None]
    steps = [ReadStep(step["token"], [], [], np.zeros((len(trace["recalled"]), heads, 3))) for step in sparse]
    for layer in range(len(trace["recalled"])):
        listed = np.frombuffer(base64.b64decode(trace["recalled"][layer]), f"<u{trace['position_bytes']}")
        levels = np.frombuffer(base64.b64decode(trace["weights"][layer]), np.uint8).astype(np.float64)
        shares = np.where(levels > 0, 2.0 ** ((levels - 255) / 8), 0.0)
        mass = np.frombuffer(base64.b64decode(trace["mass"][layer]), "<f2").reshape(len(sparse), heads, 3)
        at = weight_at = 0
        for number, step in enumerate(steps):
            step.positions.append([])
            step.shares.append([])
            step.mass[layer] = mass[number]
            for _ in range(heads):
                count = int(listed[at])
                step.positions[-1].append(listed[at + 1 : at + 1 + count].astype(np.int64))
                step.shares[-1].append(shares[weight_at : weight_at + count])
                at, weight_at = at + 1 + count, weight_at + count
        assert at == len(listed) and weight_at == len(levels), "bytes that no step needs"
    return steps


def quest_pages(trace: dict[str, Any], layer: int) -> list[list[list[int]]]:
    """Numbers of the pages that Quest would have read, by sparse step and kv head."""
    listed = np.frombuffer(base64.b64decode(trace["quest"][layer]), f"<u{trace['position_bytes']}").tolist()
    steps: list[list[list[int]]] = []
    for step in trace["steps"]:
        if step["dense"] is None:
            steps.append([])
            for _ in range(trace["server"]["kv_heads"]):
                count = listed[0]
                steps[-1].append(listed[1 : 1 + count])
                del listed[: 1 + count]
    assert not listed, "bytes that no step needs"
    return steps


def cluster_numbers(trace: dict[str, Any], layer: int) -> np.ndarray:
    """int32 [kv heads, prompt tokens]."""
    numbers = np.frombuffer(base64.b64decode(trace["clusters"][layer]), "<i4")
    return numbers.reshape(trace["server"]["kv_heads"], trace["request"]["prompt_tokens"])


class Seen(NamedTuple):
    """What a layer of a step recalled, taken from the kernels' own buffers: positions, ascending, by kv head."""

    token: int
    layer: int
    positions: list[list[int]]


class TracedWorld(World):
    """A world whose decode layers run, and whose requests are traced from their first extend on, as many as may be."""

    quest = False  # whether the traces tell what Quest would have read

    def __init__(self, config: ClusterKVConfig, **options: Any) -> None:
        super().__init__(msgspec.structs.replace(config, trace=True), **options)
        self.traces: dict[Request, Trace] = {}
        self.seen: dict[Request, list[Seen]] = {}
        self.traced_steps = 0
        self._generator = torch.Generator().manual_seed(7)

    def _begin(self, begin: Any) -> DecodeStep | None:
        for request in self.running:
            trace = self.traces.setdefault(request, Trace(self.config.trace_tokens, self.quest))
            if trace.refused is None and not self.engine.tracing.start(request.row, trace):
                trace.refused = "too many"
        return super()._begin(begin)

    def _layers(self, step: DecodeStep) -> None:
        fails = self.raises == "layer"
        super()._layers(step)
        if step.sparse is None or fails:
            return
        for request in self.running:
            if request.row in step.rows:
                self._write_kv(request, request.length - 1)
        self.settle()
        geometry = self.index.geometry
        for layer in geometry.clustered_layers:
            q = torch.randn(len(step.rows), 2 * geometry.kv_heads, geometry.head_dim, generator=self._generator)
            keys, values = self.scene.keys[layer], self.scene.values[layer]
            assert self.engine.sparse_layer(q, keys, values, layer, step, SCALE) is not None
            self.look(step, layer, q if step.sparse_at is None else q[step.sparse_at])

    def look(self, step: DecodeStep, layer: int, q: torch.Tensor) -> None:
        """Note what the layer that just ran recalled; q [B, heads, D] of the step's sparse requests."""
        buffers = cpu.decoder_of(self.index, 2, self.scene.keys[0].dtype).buffers
        rows = step.rows if step.sparse_at is None else step.rows[step.sparse_at.numpy()]
        for place, row in enumerate(rows.tolist()):
            request = next(request for request in self.running if request.row == row)
            if self.traces[request].refused is not None:
                continue
            slots = self.scene.req_to_token[row, : request.length].tolist()
            position_of = {slot: position for position, slot in enumerate(slots)}
            found = []
            for head in range(self.index.geometry.kv_heads):
                recalled = buffers.recalled[place, head, : buffers.recalled_count[place, head]]
                positions = [position_of[slot] for slot in recalled.tolist()]
                # The tokens there are the request's own, whatever their slots are.
                assert self.written[recalled].tolist() == [request.path[position] % CONTENTS for position in positions]
                found.append(sorted(positions))
            self.seen.setdefault(request, []).append(Seen(request.length - 1, layer, found))
            self.traced_steps += layer == self.index.geometry.clustered_layers[0]

    def _release(self, request: Request) -> None:
        trace = self.traces.get(request)
        if trace is not None:
            self.engine.tracing.collect(trace, request.length)
        super()._release(request)
        if trace is not None and trace.refused is None:
            assert_trace(trace, self.seen.get(request, []))


def assert_trace(trace: Trace, seen: list[Seen]) -> None:
    """A trace has the steps of its request that were sparse, with the positions that their layers recalled."""
    newest = {(look.token, look.layer): look.positions for look in seen}
    sparse = [step for step in trace.steps if step.dense is None]
    assert all(step.read is not None for step in sparse)
    kept = min((step.token for step in trace.steps), default=0)
    expected = {key: positions for key, positions in newest.items() if key[0] >= kept}
    listed = {}
    for step in sparse:
        assert step.read is not None
        for place, layer in enumerate(step.read.layers):
            listed[step.token, layer] = [
                positions[:count].tolist()
                for positions, count in zip(step.read.positions[place], step.read.count[place].tolist(), strict=True)
            ]
    assert listed == expected
