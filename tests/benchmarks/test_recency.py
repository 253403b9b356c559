"""Where recalled tokens lie: the recorder's positions are the request's, and the shares are those one can count by hand.

Red when: recording changes what a step gives, a position is not that of the slot that was recalled, a share counts padding or
steps that only warm a cache, a cache keeps other rows than the newest, or a prompt's facts lie elsewhere than it says.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.policies.control import switch
from benchmarks.policies.places import NONE, PlaceRecorder
from benchmarks.quality.decoding_kinds import (
    agent_replies,
    chat_opening,
    chat_questions,
    needle_replies,
    numbered_document,
)
from benchmarks.quality.documents import read_text
from benchmarks.quality.prompts import Prompts
from benchmarks.quality.recency import (
    SHARES,
    WARM,
    Group,
    Recalled,
    Sums,
    by_head,
    counted_again,
    groups_of,
    hits_of,
    in_cache,
    in_last,
    newest,
    oldest_kept,
    page_uses,
    parse_args,
    table,
    touched,
    used,
)
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode.cpu import decoder_of
from sglang_clusterkv.tools.demo_model import default_out
from tests.support.scenes import Scene

SCALE = 0.2
CONFIG = ClusterKVConfig(budget_tokens=64, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


# -- the recorder -----------------------------------------------------------------------------------------------------


def scene_of_two_rows() -> Scene:
    """Row 1 has 333 tokens and waits; row 2, of 700, decodes."""
    scene = Scene(CONFIG)
    scene.prefill(1, 333)
    scene.prefill(2, 700)
    return scene


def outputs(scene: Scene, steps: int) -> list[torch.Tensor]:
    found = []
    for i in range(steps):
        step = scene.decode([2], [701 + i]).sparse
        assert step is not None
        for layer in range(2):
            q = scene.queries(1, 4)
            keys, values = scene.keys[layer], scene.values[layer]
            found.append(scene.engine.sparse_decode(q, keys, values, scene.index, layer, step, SCALE))
    return found


def test_recording_changes_nothing(tmp_path: Path) -> None:
    plain, recorded = scene_of_two_rows(), scene_of_two_rows()
    switch(recorded.engine, "ours", {}, {"file": str(tmp_path / "places.npz")})
    assert isinstance(recorded.engine.sparse_decode, PlaceRecorder)
    for a, b in zip(outputs(plain, 3), outputs(recorded, 3), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.index.mass, recorded.index.mass)
    counters = plain.engine.counters
    assert recorded.engine.counters == replace(counters, build_s=recorded.engine.counters.build_s)


def test_positions_are_those_of_the_recalled_slots(tmp_path: Path) -> None:
    scene = scene_of_two_rows()
    switch(scene.engine, "ours", {}, {"file": str(tmp_path / "places.npz")})
    outputs(scene, 3)
    # What the last layer of the last step left.
    buffers = decoder_of(scene.index, 2, torch.float32).buffers
    slots = [buffers.recalled[0, h, : buffers.recalled_count[0, h]] for h in range(2)]
    switch(scene.engine, "ours", {})
    with np.load(tmp_path / "places.npz") as found:
        places, lengths = found["places"], found["lengths"]
    assert places.shape == (3, 2, 2, 64) and lengths.tolist() == [701, 702, 703]
    row = scene.slots(2, 703).numpy()
    for h in range(2):
        assert row[places[-1, -1, h]].tolist() == slots[h].tolist()
    assert places.min() >= CONFIG.sink_tokens and places.max() < 700


def test_a_step_with_a_layer_missing_is_left_out(tmp_path: Path) -> None:
    scene = scene_of_two_rows()
    switch(scene.engine, "ours", {}, {"file": str(tmp_path / "places.npz")})
    outputs(scene, 1)
    step = scene.decode([2], [702]).sparse
    assert step is not None
    scene.engine.sparse_decode(scene.queries(1, 4), scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    switch(scene.engine, "ours", {})
    with np.load(tmp_path / "places.npz") as found:
        assert found["lengths"].tolist() == [701]


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def of_one_head(steps: list[list[int]], lengths: list[int]) -> Recalled:
    most = max(map(len, steps))
    places = np.array([step + [NONE] * (most - len(step)) for step in steps])
    return Recalled(places[:, None, None], np.array(lengths))


def test_the_newest_pages_are_counted_from_the_end() -> None:
    # 10 pages and a token: 11 pages, of which a quarter are 3: from page 8 on.
    assert oldest_kept(np.array([161, 160, 64]), 4).tolist() == [128, 112, 48]
    found = of_one_head([[127, 128, 160], [5]], [161, 161])
    assert newest(found, 4)[:, 0, 0].tolist() == [[False, True, True], [False, False, False]]


def test_the_last_step_is_the_one_before() -> None:
    places = np.array([[1, 2, NONE], [2, 3, NONE], [1, 2, 3]])
    assert in_last(places).tolist() == [[False] * 3, [True, False, False], [False, True, True]]


def test_a_cache_keeps_what_was_used_last() -> None:
    places = np.array([[1, 2], [3, 4], [1, 3], [2, 4], [5, 1]])
    # Two rows are the last step's. Three: [2, 1], [4, 3, 2], [3, 1, 4], [4, 2, 3], so the last step finds neither.
    assert in_cache(places, 2).tolist() == [[False] * 2, [False] * 2, [False, True], [False] * 2, [False] * 2]
    assert in_cache(places, 3)[2:].tolist() == [[False, True], [False, True], [False, False]]
    assert in_cache(places, 4)[2:].tolist() == [[True, True], [True, True], [False, True]]


def test_a_step_that_repeats_itself_hits_and_padding_never_does() -> None:
    places = np.array([[7, 9, NONE], [9, NONE, NONE], [7, 9, NONE]])
    assert in_cache(places, 2).tolist() == [[False] * 3, [True, False, False], [True, True, False]]
    with pytest.raises(AssertionError, match="3 tokens, the cache has 2 rows"):
        in_cache(np.array([[1, 2, 3]]), 2)


def test_every_head_has_a_cache_of_its_own() -> None:
    places = np.array([[[[1], [2]]], [[[2], [2]]]])
    assert by_head(in_cache, places, 1)[1].tolist() == [[[False], [True]]]


def test_pages_are_kept_by_their_use_in_earlier_steps() -> None:
    found = of_one_head([[0, 1, 16], [0, 16, 40], [0, 16, 63]], [64, 64, 64])
    assert page_uses(found).tolist() == [[2, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    # Nothing is known at first: the newest page. Then page 0, which the first step used most.
    assert used(found, 4)[:, 0, 0].tolist() == [[False] * 3, [True, False, False], [True, False, False]]
    # Of two pages, the second is page 1.
    assert used(found, 2)[2, 0, 0].tolist() == [True, True, False]


def test_what_the_newest_pages_have_takes_no_rows_of_the_cache() -> None:
    # 64 pages; the newest quarter begins at 768. The far tokens 1 and 2 are asked for in turn.
    steps = [[1, 800 + i] if i % 2 else [2, 800 + i] for i in range(6)]
    hits = hits_of(of_one_head(steps, [1024] * 6), budget=2)
    assert hits["newest_4"][:, 0, 0].tolist() == [[False, True]] * 6
    assert hits["lru_1"][2:, 0, 0].tolist() == [[False, False]] * 4
    assert hits["newest_4_or_lru_2"][2:, 0, 0].all()
    assert set(hits) == set(SHARES)


def test_shares_are_of_the_tokens_that_were_recalled() -> None:
    places = np.array([[[[1, 2, 3, 4], [1, NONE, NONE, NONE]]]])
    hit = np.array([[[[True, False, False, False], [True, True, True, True]]]])
    sums = Sums()
    sums.hits = {"last": 0}
    sums.add(Recalled(places, np.array([64])), {"last": hit}, [0])
    found = sums.shares()
    assert found["recalled"] == 5 and found["steps"] == 1
    assert found["last"] == {"all": 0.4, "layers": [0.4], "worst_tenth": 0.25}


def test_warm_up_steps_are_not_counted_and_numbers_are_counted_for_themselves() -> None:
    steps = WARM + 4
    # Everything is old until the last two steps, which predict tokens `steps - 1` and `steps`.
    places = [[20]] * (steps - 2) + [[1000]] * 2
    group = Group("needles", 8)
    recalled = of_one_head(places, [1012 + i for i in range(steps)])
    group.add(recalled, prompt=1011, exact=[1, steps - 1, steps], right=2)
    found = group.result()
    assert found["shares"]["newest_8"]["all"] == 0.5 and found["shares"]["steps"] == 4
    assert found["exact"]["newest_8"]["all"] == 1.0 and found["exact"]["steps"] == 2
    assert (found["exact"]["right"], found["exact"]["asked"]) == (2, 3)
    assert found["pages"] == pytest.approx({"head": 1 / 64, "any": 1 / 64}, rel=0.01)
    text = table({"needles, 8": found})
    assert "| needles | 8 | 4 | 0.50 | 0.50 | 0.50 |" in text and "| needles: numbers | 8 | 2 | 1.00 |" in text


def test_positions_that_were_kept_are_counted_again(tmp_path: Path) -> None:
    steps = WARM + 4
    places, lengths = [[20]] * (steps - 1) + [[1000]] * 2, [1012 + i for i in range(steps + 1)]
    recalled = of_one_head(places, lengths)
    np.savez(tmp_path / "a.npz", places=recalled.places, lengths=recalled.lengths)
    about = {"kind": "needles", "budget": 8, "right": 1, "exact": [steps], "prompt": 1011, "answer": steps + 1}
    (tmp_path / "a.json").write_text(json.dumps(about))
    found = counted_again([tmp_path])["needles, 8"]
    # The step behind the answer's last is left out.
    assert found["shares"]["steps"] == 4 and found["shares"]["newest_8"]["all"] == 0.25
    assert found["exact"]["newest_8"]["all"] == 1.0


def test_touched_pages_are_of_the_clustered_ones() -> None:
    places = np.full((WARM + 1, 1, 2, 2), NONE)
    places[WARM, 0] = [[16, 17], [16, 40]]
    found = Recalled(places, np.full(WARM + 1, 16 + 160), first_clustered=16)
    assert touched(found) == pytest.approx((0.15, 0.2))


def test_layers_are_grouped_in_order() -> None:
    assert groups_of([float(i) for i in range(10)]) == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_answers_that_only_warm_up_are_refused() -> None:
    with pytest.raises(SystemExit):
        parse_args(["--natural", str(2 * WARM)])


# -- the prompts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    if not (default_out() / "config.json").exists():
        pytest.skip("no demo model: sglang-clusterkv demo-model")
    return Prompts(AutoTokenizer.from_pretrained(default_out()), read_text()[1])


def text_of(prompts: Prompts, ids: list[int]) -> str:
    return prompts._tokenizer.decode(ids)


def test_facts_lie_in_the_older_half(prompts: Prompts) -> None:
    document = numbered_document(prompts, 2000, 30, seed=1)
    assert (len(document.prompt), len(document.following)) == (2000, 30)
    older = text_of(prompts, document.prompt[:1100])
    assert all(f"The magic number of {city} is {number}." in older for city, number in document.facts)
    for reply in needle_replies(prompts, document, 2, seed=1):
        assert reply.prompt[:2000] == document.prompt
        digits = text_of(prompts, [reply.answer[i] for i in reply.exact]).split()
        assert len(digits) == 4 and all(int(number) in dict(document.facts).values() for number in digits)


def test_the_agent_copies_what_lies_so_far_back(prompts: Prompts) -> None:
    (reply,) = agent_replies(prompts, 4200, 1, seed=1, back=3000)
    row = text_of(prompts, reply.answer).splitlines()[0]
    session = text_of(prompts, reply.prompt)
    assert json.loads(row)["station"] and session.count(row) == 1
    behind = len(prompts.encode(session[session.index('{"station": "Havana"') :]))
    assert 3000 - 60 < behind < 3000 + 150
    assert 4000 < len(reply.prompt) < 4200 + 80
    with pytest.raises(ValueError, match="use more tokens"):
        agent_replies(prompts, 3000, 1, seed=1, back=3000)


def test_a_chat_begins_with_the_station(prompts: Prompts) -> None:
    opening = chat_opening(prompts, 900, seed=1)
    assert len(opening) == 900 and "passcode is 48213" in text_of(prompts, opening)
    first, second = chat_questions(prompts, 2)
    assert text_of(prompts, first).startswith("\n\nGood morning.")
    assert text_of(prompts, second).startswith("<|im_end|>")
