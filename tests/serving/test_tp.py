"""Tensor parallelism: each rank clusters its own kv heads, and nothing is said between ranks but whether a host tier has room.

The choices of a head are compared in one process, bit for bit; that the ranks of a server plan the same segments and that
its answers are those of one rank, with real servers: two ranks on the tiny model (four query heads, two kv heads). The
demo model's nine query heads and three kv heads can't be divided by two (SGLang ends the start), so it runs on three.

Red when: a table, a choice or a segment of a head depends on the heads beside it or on the rank; ranks plan apart; a rank
attends with another rank's heads; with a host tier an answer differs, or a rank admits what another one cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.servers import Server, serve
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import cpu
from sglang_clusterkv.kernels.refine.reference import refine
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.tools.demo_model import default_out
from tests.support import failing_refills, plugins
from tests.support.scenes import Scene
from tests.support.servers import CHUNK, POOL
from tests.support.traffic import (
    CONFIG,
    Request,
    alone,
    assert_well,
    at_once,
    borders,
    grew,
    logging_of_requests,
    prompt,
    wait_until,
)

# Ranks keep no traces.
UNTRACED = {name: value for name, value in CONFIG.items() if not name.startswith("trace")}
GROUP = 2
SCALE = 0.2
SMALL = ClusterKVConfig(budget_tokens=96, candidate_tokens=256, segment_tokens=256, recluster_every=64)
LENGTHS = [700, 333, 1300]


def rank_of(whole: Scene, head: int) -> Scene:
    """A scene with the same pages and rows that has one of the two heads."""
    rank = Scene(SMALL, kv_heads=1)
    for buffers, of_whole in ((rank.keys, whole.keys), (rank.values, whole.values)):
        for buffer, other in zip(buffers, of_whole, strict=True):
            buffer.copy_(other[:, head : head + 1])
    rank.free_pages = list(whole.free_pages)
    return rank


def served(scene: Scene) -> object:
    """Three requests that decode; the lists of their last step."""
    for row, length in enumerate(LENGTHS, 1):
        scene.prefill(row, length)
    for more in range(1, 140):  # decoded tokens become segments too
        step = scene.decode([1, 2, 3], [length + more for length in LENGTHS])
    assert step.sparse is not None and step.dense is None
    return step.sparse


@pytest.fixture(scope="module")
def ranks() -> tuple[Scene, list[Scene], object]:
    whole = Scene(SMALL, kv_heads=2)
    parts = [rank_of(whole, head) for head in range(2)]
    step, *others = [served(scene) for scene in (whole, *parts)]
    for other in others:
        for name in ("pages", "page_count", "base_slots", "segment_begin"):
            assert torch.equal(getattr(step, name), getattr(other, name)), name
    return whole, parts, step


def test_a_heads_tables_are_the_same_on_a_rank_of_its_own(ranks: tuple[Scene, list[Scene], object]) -> None:
    whole, parts, _ = ranks
    assert int((whole.index.page_state[:, 0] >= 0).sum()) > 100
    for head, part in enumerate(parts):
        for name, array in whole.index.arrays.items():
            of_head = array if name == "page_state" else array[:, :, head : head + 1]
            assert torch.equal(of_head.contiguous().view(torch.uint8), part.index.arrays[name].view(torch.uint8)), name
        assert part.engine.server_info()["segments"] == whole.engine.server_info()["segments"]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_head_recalls_the_same_slots_on_a_rank_of_its_own(
    ranks: tuple[Scene, list[Scene], object], layer: int
) -> None:
    whole, parts, step = ranks
    q = whole.queries(3, 2 * GROUP)
    output = cpu.sparse_decode(q, whole.keys[layer], whole.values[layer], whole.index, layer, step, SCALE)
    buffers = cpu.decoder_of(whole.index, GROUP, torch.float32).buffers
    recalled, count = buffers.recalled.copy(), buffers.recalled_count.copy()
    assert (count == SMALL.budget_tokens).all()
    assert not np.array_equal(recalled[:, 0], recalled[:, 1]), "two heads that choose alike would show nothing"
    for head, part in enumerate(parts):
        own = q[:, head * GROUP : (head + 1) * GROUP].contiguous()
        of_rank = cpu.sparse_decode(own, part.keys[layer], part.values[layer], part.index, layer, step, SCALE)
        chosen = cpu.decoder_of(part.index, GROUP, torch.float32).buffers
        np.testing.assert_array_equal(chosen.recalled_count[:, 0], count[:, head])
        np.testing.assert_array_equal(chosen.recalled[:, 0], recalled[:, head])
        assert torch.equal(of_rank, output[:, head * GROUP : (head + 1) * GROUP])


def test_the_reference_chooses_the_same_slots_too(ranks: tuple[Scene, list[Scene], object]) -> None:
    whole, parts, step = ranks
    q = whole.queries(3, 2 * GROUP).unflatten(1, (2, GROUP))
    slots = []
    for scene, own in ((whole, q), *((part, q[:, head : head + 1]) for head, part in enumerate(parts))):
        scores = score(own, scene.keys[0], scene.index, 0, step, SCALE)
        candidates = select(scores, scene.index, 0, step, SMALL.candidate_tokens)
        slots.append(refine(own, scores, candidates, scene.index, 0, step, SCALE).slots)
    assert torch.equal(slots[0], torch.cat(slots[1:], 1))


# ---- servers


@pytest.fixture(scope="module")
def two_ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tp2")
    # SGLang asks for the cores of each rank where the machine has one memory node.
    environment = logging_of_requests(folder) | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    arguments = ["--tp-size", "2", "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(POOL)]
    arguments += ["--max-running-requests", "8", "--sleep-on-idle"]
    with serve(tiny, folder / "server.log", *arguments, config=UNTRACED, environment=environment) as running:
        yield running


@pytest.mark.server
@pytest.mark.long
def test_two_ranks_answer_as_one_and_plan_the_same_segments(two_ranks: Server, tiny_server: Server) -> None:
    trunk = prompt(80)
    branch = trunk[:640] + prompt(81, 400)
    servers = (two_ranks, tiny_server)
    expected = [alone(tiny_server, ids, 48) for ids in (trunk, branch)]
    of_ranks = []
    for server, count in zip(servers, (2, 1), strict=True):
        server.flush()
        before = server.counts()
        first = server.generate(trunk, 48)
        second = server.generate(branch, 48)
        assert [first["output_ids"], second["output_ids"]] == expected
        told = [borders(server, answer["meta_info"]["id"], count) for answer in (first, second)]
        assert all(own == of[0] and len(own) > 3 for of in told for own in of)
        after = server.counts()
        names = ("segments", "tokens_clustered", "splits", "merges", "sparse_steps", "tokens_recalled")
        of_ranks.append((told[0][0], told[1][0], [grew(before, after, name) for name in names]))
    assert of_ranks[0] == of_ranks[1], "two ranks and one have the same segments and counts"


@pytest.mark.server
@pytest.mark.long
def test_ranks_stay_together_under_load(two_ranks: Server) -> None:
    prompts = [prompt(82 + i, 900 - 48 * i) for i in range(5)]
    two_ranks.flush()
    requests = [Request(two_ranks, ids, 40) for ids in prompts]
    at_once(two_ranks, [prompts[0][:500] + prompt(90, 300), prompts[0]], 24)
    requests[4].abort()
    for request in requests:
        request.result()
        first, second = borders(two_ranks, request.rid, ranks=2)
        assert first == second and first
    assert_well(two_ranks)


def ask(server: Server) -> tuple[object, ...]:
    """A prompt longer than the device tier below, with what its tokens' probabilities are, then again, then four at once."""
    server.flush()
    first = server.generate(prompt(95, 3000), 16, return_logprob=True)
    again = server.generate(prompt(95, 3000), 16)["output_ids"]
    crowd = [answer["output_ids"] for answer in at_once(server, [prompt(96 + i, 700) for i in range(4)], 8)]
    return first["output_ids"], first["meta_info"]["output_token_logprobs"], again, crowd


@pytest.mark.server
@pytest.mark.long
def test_two_ranks_with_a_host_tier_answer_as_two_without_and_wait_together(tiny: Path, tmp_path: Path) -> None:
    """Refills then fail on the second rank alone: neither admits anything, both go on decoding."""
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    arguments = ["--tp-size", "2", "--chunked-prefill-size", "256", "--max-total-tokens", "8192", "--sleep-on-idle"]
    arguments += ["--max-running-requests", "4", "--random-seed", "1"]
    with serve(tiny, tmp_path / "device.log", *arguments, config=UNTRACED, environment=environment) as server:
        expected = ask(server)
    environment |= plugins.install(tmp_path, failing_refills)
    config = UNTRACED | {"host_ratio": 4}
    with serve(tiny, tmp_path / "server.log", *arguments, config=config, environment=environment) as server:
        assert ask(server) == expected
        info = server.counts()["host_tier"]
        assert info["read_bytes_prefill"] > 0 and info["recalled_rows_host"] > 0
        running = [Request(server, prompt(100 + i, 300), 1200) for i in range(2)]
        for request in running:
            request.wait_for(4)
        failing_refills.fail(tmp_path, rank=1)
        wait_until(lambda: "offload failed" in server.log.read_text(), 120)
        late = Request(server, prompt(102, 300), 4)
        for request in running:
            request.wait_for(len(request.output_ids) + 20)
        assert late.running and not late.output_ids, "a rank admitted what the other could not"
        assert not server.counts()["faults"], "of the first rank"
        failing_refills.succeed(tmp_path)
        late.join()
        assert late.output_ids and all(request.running for request in running)
        for request in running:
            request.abort()
            request.join()
        assert ask(server) == expected
        assert server.process.poll() is None and "leak" not in server.log.read_text().lower()


@pytest.mark.server
@pytest.mark.long
def test_the_demo_model_on_three_ranks(tmp_path: Path) -> None:
    """A smoke test; two ranks end with SGLang's own "9 is not divisible by 2"."""
    arguments = ["--tp-size", "3", "--max-total-tokens", "4096", "--max-running-requests", "2"]
    config = {"budget_tokens": 128, "candidate_tokens": 512, "segment_tokens": 256, "recluster_every": 64}
    environment = logging_of_requests(tmp_path) | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    with serve(default_out(), tmp_path / "server.log", *arguments, config=config, environment=environment) as server:
        text = "The secret passcode of the vault is 48213. " + "The sea was calm that day. " * 90
        question = text + "\nWhat is the secret passcode of the vault? The secret passcode of the vault is"
        answer = server.generate(question, 6)
        assert "48213" in answer["text"], answer["text"]
        assert server.counts()["sparse_steps"] >= 4
        first, *others = borders(server, answer["meta_info"]["id"], ranks=3)
        assert len(first) >= 2 and all(other == first for other in others)
        assert_well(server)
