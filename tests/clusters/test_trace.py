"""A trace tells what its request's steps recalled, position by position, and nothing of any other request.

Red when: a position is not what the reference chain recalls on the same step, with shared prefixes, cuts, merges, rewritten
rows and a host tier; a weight or a share of the mass is another one; a token of another request shows; more steps are kept
than asked for, or which were dropped is not said; a retracted request's steps are told twice; the trace of a step that failed
looks sparse; a failure of the tracing itself costs a step; or anything is done where traces are off.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from benchmarks.policies import POLICIES
from benchmarks.policies.policy import Reading
from sglang_clusterkv.clusters import tracing
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.trace import Step, Trace, document
from sglang_clusterkv.clusters.tracing import MOST_AT_ONCE, RequestTracing, Tracing
from sglang_clusterkv.kernels.attend.reference import attend
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.kernels.estimate.reference import estimate
from sglang_clusterkv.kernels.refine.reference import recall_all, refine
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.kernels.trace.quest import PageBounds
from sglang_clusterkv.kernels.trace.reference import Looks
from sglang_clusterkv.memory.index import UNCLUSTERED
from sglang_clusterkv.memory.step_bytes import kv_bytes, sparse_bytes
from tests.support import machine
from tests.support.machine import COUNTS, SchedulerMachine
from tests.support.scenes import PAGE, Scene, Tiers
from tests.support.traces import SCALE, Seen, TracedWorld, cluster_numbers, quest_pages, read_trace
from tests.support.world import SMALL, Request, served, stream

CONFIG = msgspec.structs.replace(SMALL, merge_segments=True, recluster_every=64)
SIZES = {"layers": 2, "kv_heads": 2, "head_dim": 32}


def document_of(world: TracedWorld, request: Request, prompt_tokens: int) -> dict[str, Any]:
    """The trace of a request that still has its row."""
    trace = world.traces[request]
    world.engine.tracing.collect(trace, request.length)
    return document(
        trace,
        prompt=list(range(prompt_tokens)),
        answer=list(range(request.length + 1 - prompt_tokens)),
        server={"kv_heads": SIZES["kv_heads"]},
        request={},
        step_bytes=lambda step, layers: (layers, step.token),
        row_of=world.index.row_of,
        encode=lambda data: base64.b64encode(data).decode(),
    )


class Expected(NamedTuple):
    """What the references say of a request in a layer of a step."""

    positions: list[list[int]]  # by kv head, ascending
    shares: list[np.ndarray]  # float64, of the mass, of these positions
    mass: np.ndarray  # float64 [heads, 3]


class ReferenceWorld(TracedWorld):
    """A traced world beside which the reference chain runs, on the same steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.expected: dict[tuple[Request, int, int], Expected] = {}
        self.quest_pages: dict[tuple[Request, int, int], list[list[int]]] = {}

    def look(self, step: DecodeStep, layer: int, q: torch.Tensor) -> None:
        super().look(step, layer, q)
        index, config = self.index, self.index.config
        keys, values = self.scene.keys[layer], self.scene.values[layer]
        tier = self.engine.residency.layer(layer).get("tier")
        grouped = q.float().unflatten(1, (index.geometry.kv_heads, -1))
        scores = score(grouped, keys, index, layer, step.sparse, SCALE, tier)
        limit = config.candidate_tokens if config.refine else config.budget_tokens
        candidates = select(scores, index, layer, step.sparse, limit)
        recalled = (
            refine(grouped, scores, candidates, index, layer, step.sparse, SCALE)
            if config.refine
            else recall_all(scores, candidates)
        )
        exact = attend(grouped, keys, values, step.sparse, recalled.slots, recalled.count, SCALE, tier).lse.double()
        if config.estimate:
            rest = estimate(scores, recalled.left, index, layer, step.sparse, grouped, SCALE, recalled.code).lse
            whole = torch.logaddexp(exact, rest.double())
        else:
            whole = torch.maximum(exact, scores.total.double())
        rows = step.rows if step.sparse_at is None else step.rows[step.sparse_at.numpy()]
        for place, row in enumerate(rows.tolist()):
            request = next(request for request in self.running if request.row == row)
            if self.quest:
                found = self._quest(request, layer, grouped[place])
                self.quest_pages[request, request.length - 1, layer] = found
            self.expected[request, request.length - 1, layer] = self._expected(
                request,
                layer,
                grouped[place].double(),
                recalled.slots[place],
                recalled.count[place],
                exact[place],
                whole[place],
            )

    def _quest(self, request: Request, layer: int, q: torch.Tensor) -> list[list[int]]:
        """By kv head, the recallable pages with the largest bounds, from what the tokens' keys are."""
        step = self.traces[request].steps[-1]
        base = {position for begin, end in step.base for position in range(begin, end)}
        pages = sorted({position // PAGE for position in range(step.token + 1) if position not in base})
        content = self.contents.of(request.path[: request.length])[0][layer].float()
        bounds = []
        for page in pages:
            keys = content[page * PAGE : (page + 1) * PAGE]
            sides = torch.maximum(q * keys.amin(0).unsqueeze(1), q * keys.amax(0).unsqueeze(1))
            bounds.append(sides.sum(-1).mean(1))  # [H]
        count = min(self.config.budget_tokens // PAGE, len(pages))
        best = torch.stack(bounds, 1).topk(count).indices
        return [sorted(pages[at] for at in head) for head in best.tolist()]

    def _expected(
        self, request: Request, layer: int, q: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor,
        exact: torch.Tensor, whole: torch.Tensor,
    ) -> Expected:  # fmt: skip
        row = self.scene.req_to_token[request.row, : request.length].long()
        # What a token's key is depends on its content alone: where the pool has it does not matter here.
        content = self.contents.of(request.path[: request.length])[0][layer].double()  # [tokens, H, D]
        position_of = {slot: position for position, slot in enumerate(row.tolist())}
        positions, shares, mass = [], [], np.zeros((len(q), 3))
        for head in range(len(q)):
            found = sorted(position_of[slot] for slot in slots[head, : int(counts[head])].tolist())
            logits = SCALE * content[found, head] @ q[head].T
            share = (logits - whole[head]).exp().mean(1).numpy()
            read = float((exact[head] - whole[head]).exp().mean())
            positions.append(found)
            shares.append(share)
            mass[head] = read - share.sum(), share.sum(), 1 - read
        return Expected(positions, shares, mass)


def everything(world: TracedWorld) -> tuple[Request, int]:
    """Shared prefixes, a cut, merges of a chat's turns and of decoded runs, and a rewritten row, while one request decodes."""
    first = served(world, stream(1, 500), decoded=3)
    second = served(world, stream(1, 370) + stream(2, 150), decoded=2)  # cuts what the first made
    twins = [world.submit(stream(3, 400)), world.submit(stream(3, 400))]
    world.extend(*twins)
    world.decode(first, second, *twins, steps=4)  # one of them takes the other's pages
    world.finish(second)
    opening = served(world, stream(4, 250))
    world.finish(opening)
    turn = served(world, opening.tokens + stream(5, 100))  # its segment and the opening's become one
    world.decode(first, turn, *twins, steps=130)
    world.finish(turn)
    return first, 500


@pytest.mark.parametrize(
    ("options", "tiers", "at_layers"),
    [
        ({}, None, False),
        ({}, Tiers.of(400, 2, 900, 6), False),
        ({"estimate": False}, None, False),
        ({"refine": False}, None, False),
        ({"reproducible": True}, None, False),
        ({}, None, True),  # as on a GPU
    ],
    ids=str,
)
def test_a_trace_is_what_the_references_recall(
    options: dict[str, Any], tiers: Tiers | None, at_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_layers:
        monkeypatch.setattr(tracing, "looks", Looks)
    world = ReferenceWorld(msgspec.structs.replace(CONFIG, **options), tiers=tiers, **SIZES)
    request, prompt_tokens = everything(world)
    compared = 0
    for one, prompt in [(request, prompt_tokens), *((other, 400) for other in world.running if other is not request)]:
        trace = document_of(world, one, prompt)
        assert trace["server"]["recalling_layers"] == [0, 1] and trace["position_bytes"] == 2
        for step in read_trace(trace):
            for layer in (0, 1):
                expected = world.expected[one, step.token, layer]
                for head in range(SIZES["kv_heads"]):
                    assert step.positions[layer][head].tolist() == expected.positions[head]
                    share = expected.shares[head]
                    large = share > 1e-6
                    # A level is a factor of 2^(1/8), so half a level is 4.5 %.
                    np.testing.assert_allclose(step.shares[layer][head][large], share[large], rtol=0.046)
                    assert (step.shares[layer][head][~large] < 1.1e-6).all()
                np.testing.assert_allclose(step.mass[layer], expected.mass, atol=2e-3)
                compared += 1
    assert compared > 400
    if not options and tiers is None and not at_layers:
        counters = world.engine.counters
        assert counters.splits and counters.merges, "the scene cuts and merges nothing"
        assert any(step["dense"] == "dirty" for step in trace["steps"]), "no row was rewritten"


@pytest.mark.parametrize("tiers", [None, Tiers.of(400, 2, 900, 6)], ids=str)
def test_quest_would_have_read_the_pages_with_the_largest_bounds(
    monkeypatch: pytest.MonkeyPatch, tiers: Tiers | None
) -> None:
    monkeypatch.setattr(ReferenceWorld, "quest", True)
    world = ReferenceWorld(CONFIG, tiers=tiers, **SIZES)
    request, prompt_tokens = everything(world)
    trace = document_of(world, request, prompt_tokens)
    sparse = [step["token"] for step in trace["steps"] if step["dense"] is None]
    for layer in (0, 1):
        told = quest_pages(trace, layer)
        assert told == [world.quest_pages[request, token, layer] for token in sparse]
    assert len(sparse) > 100
    assert any(pages[0] != told[0][0] for pages in told), "one choice for all steps"


def test_the_base_of_each_step_is_what_is_always_attended() -> None:
    world = TracedWorld(CONFIG, **SIZES)
    request, prompt_tokens = everything(world)
    for step in document_of(world, request, prompt_tokens)["steps"]:
        base = [position for begin, end in step["base"] for position in range(begin, end)]
        assert base == sorted(set(base)) and base[-1] == step["token"]
        if step["dense"] is None:
            assert len(base) + step["clustered"] == step["token"] + 1
            assert set(range(CONFIG.sink_tokens)) <= set(base)
            assert set(range(step["token"] + 1 - CONFIG.window_tokens, step["token"] + 1)) <= set(base)
        else:
            assert base == list(range(step["token"] + 1))


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_clusters_are_those_of_the_index(layers: tuple[int, ...]) -> None:
    world = TracedWorld(CONFIG, **SIZES, clustered=layers)
    request, prompt_tokens = everything(world)
    trace = document_of(world, request, prompt_tokens)
    row = world.scene.req_to_token[request.row, : request.length].long()
    index = world.index
    assert trace["server"]["recalling_layers"] == list(layers)
    for place, layer in enumerate(layers):
        numbers, view = cluster_numbers(trace, place), index.layer(layer)
        for head in range(SIZES["kv_heads"]):
            spread = np.frombuffer(base64.b64decode(trace["cluster_spread"][place][head]), "<f2")
            assert numbers.max() < len(spread)
            clustered = 0
            for begin, end in world.segments(request):
                slots = row[begin:end]
                members, ends = view.members[slots, head].tolist(), index.cluster_rows(slots[::PAGE] // PAGE).flatten()
                previous = 0
                for cluster in ends.tolist():
                    stop = int(view.cluster_end[cluster, head])
                    inside = [begin + offset for offset in members[previous:stop] if begin + offset < prompt_tokens]
                    assert len({int(numbers[head, position]) for position in inside}) <= 1
                    for position in inside:
                        assert spread[numbers[head, position]] == np.float16(float(view.spread[cluster, head]))
                    clustered += len(inside)
                    previous = stop
            assert clustered == int((numbers[head] >= 0).sum()) > 200
    assert (index.page_state[row[::PAGE] // PAGE, 0] != UNCLUSTERED).any()


def test_the_oldest_steps_are_dropped_and_counted() -> None:
    world = TracedWorld(msgspec.structs.replace(CONFIG, trace_tokens=5), **SIZES)
    request = served(world, stream(1, 500), decoded=12)
    trace = document_of(world, request, 500)
    assert [step["token"] for step in trace["steps"]] == [507, 508, 509, 510, 511]
    assert trace["request"]["dropped_steps"] == 7
    assert len(read_trace(trace)) == 5


def test_a_step_beyond_the_answer_is_not_told() -> None:
    trace = Trace(10)
    for token in (5, 6, 7):
        trace.add(Step(token, "budget", [(0, token + 1)], 0, 0))
    kept, dropped = trace.until(7)
    assert [step.token for step in kept] == [5, 6] and dropped == 0


def test_a_retracted_requests_steps_are_told_once() -> None:
    trace = Trace(10)
    for token in (5, 6, 7, 6, 7, 8):
        trace.add(Step(token, "budget", [(0, token + 1)], 0, 0))
    kept, dropped = trace.until(9)
    assert [step.token for step in kept] == [5, 6, 7, 8] and dropped == 0


def test_a_sparse_step_whose_layers_did_not_run_is_not_told_as_one() -> None:
    trace = Trace(10)
    trace.add(Step(5, None, [(0, 6)], 0, 0))
    trace.add(Step(6, "dirty", [(0, 7)], 0, 0))
    kept, dropped = trace.until(9)
    assert [step.token for step in kept] == [6] and dropped == 1


def test_a_step_with_a_failed_layer_is_told_as_dense() -> None:
    world = TracedWorld(CONFIG, **SIZES)
    request = served(world, stream(1, 500), decoded=3)
    world.raises = "layer"
    world.decode(request)
    world.decode(request, steps=4)
    steps = document_of(world, request, 500)["steps"]
    assert [step["dense"] for step in steps][3] == "fault"
    assert steps[-1]["dense"] is None and steps[3]["base"] == [[0, steps[3]["token"] + 1]]


def test_a_failure_of_the_tracing_costs_the_trace_and_no_step(caplog: pytest.LogCaptureFixture) -> None:
    world = TracedWorld(CONFIG, **SIZES)
    request = served(world, stream(1, 500), decoded=2)
    for name in ("looks", "Step"):
        world.traces[request].refused = None
        assert world.engine.tracing.start(request.row, world.traces[request])
        with patch.object(tracing, name, side_effect=RuntimeError("a fault of the test")):
            world.decode(request)
        refused = world.traces[request].refused
        assert refused is not None and "log" in refused
        world.injected["trace"] += 1
        assert world.engine.counters.faults == {"trace": world.injected["trace"]}
        world.decode(request)
    assert world.engine.server_info()["sparse_steps"] == 6
    assert "trace failed" in caplog.text


def test_a_failure_at_a_layer_costs_the_trace_and_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TracedWorld, "quest", True)
    world = TracedWorld(CONFIG, **SIZES)
    request = served(world, stream(1, 500), decoded=2)
    with patch.object(PageBounds, "chosen", side_effect=RuntimeError("a fault of the test")):
        world.decode(request)
    assert world.traces[request].refused is not None and world.index.watched is None
    world.injected["trace"] += 1
    world.decode(request)
    assert world.engine.server_info()["sparse_steps"] == 4


def test_no_more_are_traced_at_once_than_four() -> None:
    world = TracedWorld(CONFIG, **SIZES)
    requests = [world.submit(stream(name, 300)) for name in range(MOST_AT_ONCE + 2)]
    world.extend(*requests)
    world.decode(*requests, steps=2)
    assert [world.traces[request].refused for request in requests] == [None] * MOST_AT_ONCE + ["too many"] * 2
    world.finish(requests[0])
    late = served(world, stream(9, 300), decoded=2)
    assert world.traces[late].refused is None and world.traces[late].steps


def test_bytes_are_counted_as_the_tables_of_the_documents_do() -> None:
    segment = CONFIG.segment_tokens
    for moving, clustered, base in (("never", 4 * segment, 90), ("always", 20 * segment, 200)):
        config = msgspec.structs.replace(CONFIG, moving_values=moving)
        reading = Reading(clustered, base, 64, config)
        ours = POLICIES["ours"].step_bytes(reading, 1)
        assert ours == sparse_bytes(config, 64, 2, clustered=clustered, base=base, segments=clustered // segment)
    assert kv_bytes(10, 64, 2) == POLICIES["dense"].step_bytes(Reading(0, 10, 64, CONFIG), 1)


# ---- off


def test_off_a_layer_is_the_chain_itself_and_a_step_keeps_nothing() -> None:
    scene = Scene(CONFIG)
    engine = scene.engine
    assert engine.sparse_decode is sparse_decode and type(engine.tracing) is Tracing
    assert not vars(engine.tracing)
    traced = Scene(msgspec.structs.replace(CONFIG, trace=True)).engine
    assert traced.sparse_decode is not sparse_decode and type(traced.tracing) is RequestTracing


def test_nobody_asks_nothing_is_looked_at() -> None:
    scene = Scene(msgspec.structs.replace(CONFIG, trace=True))
    scene.prefill(1, 700)
    step = scene.decode([1], [701])
    assert step.sparse is not None
    with (
        patch.object(tracing, "looks", side_effect=AssertionError),
        patch.object(RequestTracing, "_begin", side_effect=AssertionError),
    ):
        q = scene.queries(1, 4)
        assert scene.engine.sparse_layer(q, scene.keys[0], scene.values[0], 0, step, SCALE) is not None
        scene.decode([1], [702])
    assert not scene.engine.counters.faults


# ---- any schedule


@pytest.fixture
def traced_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TracedWorld]]:
    """The machine of test_machine.py over worlds that are traced."""
    worlds: list[TracedWorld] = []

    def traced_world(*arguments: Any, **options: Any) -> TracedWorld:
        options |= {"checks": False, "graphs": 0}  # test_machine.py has the rules; traced steps are in no graph
        options |= {"head_dim": 32}  # kernels for it are compiled anyway
        world = TracedWorld(*(arguments or (SMALL,)), **options)
        worlds.append(world)
        return world

    monkeypatch.setattr(machine, "World", traced_world)
    yield worlds


def test_no_schedule_shows_a_token_of_another_request(traced_machine: list[TracedWorld]) -> None:
    """`TracedWorld` compares each trace with the kernels' buffers and each recalled token with its request's own."""
    COUNTS.clear()
    few = settings(
        max_examples=30,
        stateful_step_count=40,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    events = ("rewrite", "merge", "splits", "reused", "lagging", "retract")
    for number in range(1, 5):  # which worlds a seed makes depends on the modules that are loaded
        run_state_machine_as_test(seed(number)(SchedulerMachine), settings=few)
        if all(COUNTS[name] for name in events):
            break
    assert sum(world.traced_steps for world in traced_machine) > 150
    assert all(COUNTS[name] for name in events), COUNTS


def test_a_token_of_another_request_would_be_noticed() -> None:
    world = TracedWorld(CONFIG, **SIZES)
    first, second = served(world, stream(1, 500)), served(world, stream(2, 500))
    world.decode(first, second, steps=2)
    world.seen[first] = [Seen(look.token, look.layer, look.positions[::-1]) for look in world.seen[first]]
    with pytest.raises(AssertionError):
        world.finish(first)
