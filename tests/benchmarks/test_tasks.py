"""Prompts, scores and intervals of the task-level evaluation (benchmarks/quality), without a server.

Red when: a prompt is not the same from the same seed, depends on another, misses its length or its depth, lacks an expected
answer or gives it away in the question; questions over one document count as independent; a score, a paired interval, a ratio
of lengths is not what its definition says; a cell where dense can't answer is judged or goes unlisted; a forced question
leaves a choice, or an answer is forced; nothing says that lm-eval is missing; a row is headed by the length asked for where a
prompt has another, or a prompt is counted that is not the result's.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality.asking import ForcedQuestion, arms_of
from benchmarks.quality.model_level import Arm
from benchmarks.quality.prompts import (
    COMMON_WORDS,
    DEPTHS,
    HOPS,
    TASKS,
    TOGETHER,
    VALUES,
    WORDS,
    Prompts,
    Sample,
    sentences_of,
)
from benchmarks.quality.ruler import optional, recount
from benchmarks.quality.scores import Answer, bootstrap, change, judged, length_ratio, read_answers, string_match, table
from benchmarks.quality.tasks import answer_of, groups_of, heat_map, make_samples
from benchmarks.quality.turns import answers_of, hold_session, make_conversation, parse_args, recalling

LENGTHS = (700, 1501)


class Pieces:
    """A tokenizer whose tokens are words with the space before them, and single characters else."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        ids = []
        for piece in re.findall(r" ?[A-Za-z]+|.", text, re.DOTALL):
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def prose() -> str:
    """Two thousand sentences of made-up words."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(5, 8))) for _ in range(500)]
    return "\n".join(" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(2000))


@pytest.fixture(scope="module")
def tokenizer() -> Pieces:
    return Pieces()


@pytest.fixture(scope="module")
def prompts(tokenizer: Pieces) -> Prompts:
    return Prompts(tokenizer, prose())


def text_of(tokenizer: Pieces, sample: Sample) -> tuple[str, str]:
    return tokenizer.decode(sample.document), tokenizer.decode(sample.question)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_has_its_length_and_its_answers(prompts: Prompts, tokenizer: Pieces, task: str, length: int) -> None:
    for number in range(6):
        sample = prompts.make(task, length, number)
        document, question = text_of(tokenizer, sample)
        assert len(sample.document) + len(sample.question) == length
        for value in sample.expected:
            assert re.search(rf"\b{value}\b", document)
            assert value not in question
        assert document.startswith("<user>")
        assert "<assistant>" in question
        assert sample.answer_tokens >= 12


def test_the_same_seed_gives_the_same_prompt_whatever_was_made_before(tokenizer: Pieces) -> None:
    first, second = Prompts(tokenizer, prose()), Prompts(tokenizer, prose())
    wanted = [first.make(task, 700, number) for task in TASKS for number in range(3)]
    again = [second.make(task, 700, number) for task in reversed(TASKS) for number in reversed(range(3))]
    assert wanted == list(reversed(again))
    assert len({tuple(sample.document) for sample in wanted}) == len(wanted)
    other = Prompts(tokenizer, prose(), seed=8)
    assert all(other.make(sample.task, 700, sample.number).document != sample.document for sample in wanted)


@pytest.mark.parametrize("task", ["needle", "needle with distractors"])
def test_the_needle_lies_at_its_depth(prompts: Prompts, tokenizer: Pieces, task: str) -> None:
    for number, depth in enumerate(DEPTHS):
        sample = prompts.make(task, 1501, number)
        document, _ = text_of(tokenizer, sample)
        assert sample.depth == depth
        assert abs(100 * document.index(sample.expected[0]) / len(document) - depth) < 6


def test_each_task_has_what_makes_it_hard(prompts: Prompts, tokenizer: Pieces) -> None:
    documents = {task: text_of(tokenizer, prompts.make(task, 1501, 0))[0] for task in TASKS}
    assert documents["needle"].count("The magic number of") == 1
    cities = re.findall(r"The magic number of (\w+) is \d{5}\.", documents["needle with distractors"])
    assert len(set(cities)) == len(cities) == 6
    assert len(set(re.findall(r"One of the magic numbers of \w+ is (\d+)", documents["needle with values"]))) == VALUES


def test_a_chain_of_variables_is_in_order(prompts: Prompts, tokenizer: Pieces) -> None:
    for number in range(10):
        sample = prompts.make("variables", 700, number)
        document, question = text_of(tokenizer, sample)
        chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document)
        assert [name for name, _ in chain] == sample.expected
        assert [value for _, value in chain[1:]] == sample.expected[:-1]
        assert len(chain) == 1 + HOPS
        assert chain[0][1] in question


def test_common_words_are_the_most_frequent(prompts: Prompts, tokenizer: Pieces) -> None:
    sample = prompts.make(WORDS, 1501, 0)
    words = re.findall(r"\d+\. (\w+)", text_of(tokenizer, sample)[0])
    counts = {word: words.count(word) for word in words}
    assert set(sorted(counts, key=lambda word: counts[word])[-COMMON_WORDS:]) == set(sample.expected)
    assert min(counts[word] for word in sample.expected) > 3 * max(
        count for word, count in counts.items() if word not in sample.expected
    )


def test_one_document_has_what_all_its_questions_ask_for(prompts: Prompts, tokenizer: Pieces) -> None:
    samples = prompts.make_together(1501, 0)
    assert Counter(sample.task for sample in samples) == TOGETHER
    assert len({(sample.task, sample.part) for sample in samples}) == len(samples)
    (document,) = {tokenizer.decode(sample.document) for sample in samples}
    for sample in samples:
        question = tokenizer.decode(sample.question)
        assert document.startswith("<user>") and "<assistant>" in question
        for value in sample.expected:
            assert re.search(rf"\b{value}\b", document) and value not in question
    assert max(len(sample.document) + len(sample.question) for sample in samples) == 1501
    chain = [f"VAR {name} = " for name in next(s.expected for s in samples if s.task == "variables")]
    assert sorted(chain, key=document.index) == chain
    cities = re.findall(r"The magic number of (\w+) is \d{5}\.", document)
    assert len(set(cities)) == len(cities) == 6
    assert prompts.make_together(1501, 0) == samples
    assert prompts.make_together(1501, 1)[0].document != samples[0].document


def test_questions_over_one_document_are_asked_and_drawn_together(prompts: Prompts) -> None:
    both = [sample for number in range(2) for sample in prompts.make_together(700, number)]
    each = len(both) // 2
    assert groups_of(both) == [both[:each], both[each:]]
    alone = make_samples(prompts, ["needle"], [700], 5)
    assert groups_of(alone) == [alone[:4], alone[4:]]
    arm = Arm("ours 256", "ours", {})
    found = [answer_of(arm, sample, [1], "") for sample in both]
    assert len({answer.question for answer in found}) == len(found)
    assert [len({a.document for a in part}) for part in (found, found[:each])] == [2, 1]


def test_a_plain_prompt_has_no_template(tokenizer: Pieces) -> None:
    sample = Prompts(tokenizer, prose(), chat=False).make("needle", 700, 0)
    document, question = text_of(tokenizer, sample)
    assert "<user>" not in document
    assert question.startswith("\n\nQuestion: What is the magic number of ")
    assert "\nAnswer: The magic number of " in question


def test_prose_is_whole_sentences_without_digits() -> None:
    text = (
        "A heading\nThis sentence is long enough to be taken. This one has version 11 in it, so it is not.\nToo short."
    )
    assert sentences_of(text) == [" This sentence is long enough to be taken."]


def test_what_can_not_be_made_is_said(prompts: Prompts, tokenizer: Pieces) -> None:
    with pytest.raises(ValueError, match="use a longer length"):
        prompts.make("needle with distractors", 60, 0)
    with pytest.raises(ValueError, match="use a longer one"):
        prompts.make("needle", 40_000, 0)
    with pytest.raises(ValueError, match="use a longer one"):
        Prompts(tokenizer, "Nothing in here is long enough.")


def test_strings_are_matched_by_share() -> None:
    assert string_match("They are 12,345 and 54321.", ["12345", "54321", "11111"]) == pytest.approx(2 / 3)
    assert string_match("ABCDE, fghij", ["abcde", "FGHIJ"]) == 1
    assert string_match("", ["1"]) == 0


def test_an_interval_is_that_of_its_samples() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.1, 400)
    found = bootstrap(values.tolist())
    assert found.points == pytest.approx(100 * values.mean())
    half = 100 * 1.96 * values.std() / 20
    assert found.points - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.points == pytest.approx(half, rel=0.1)
    assert bootstrap([-0.5] * 10)[:3] == pytest.approx((-50, -50, -50))


def test_samples_of_a_group_are_drawn_together() -> None:
    values = [0.0, 1.0] * 8
    alone, pairs = bootstrap(values), bootstrap(values, [i // 2 for i in range(16)])
    halves = bootstrap(values, [i % 2 for i in range(16)])
    assert pairs.high - pairs.low == pytest.approx(0)  # every pair has the same mean
    assert (halves.low, halves.high) == (0, 100)  # of two groups, one is drawn twice half of the time
    assert 30 < alone.high - alone.low < 60


def answers(scores: dict[str, dict[str, list[float]]], tokens: dict[str, int] | None = None) -> list[Answer]:
    """Scores by task, arm and sample."""
    return [
        Answer(arm, task, 4096, number, "-", f"{task}/{number}", score, (tokens or {}).get(arm, 10), "", ["1"])
        for task, arms in scores.items()
        for arm, values in arms.items()
        for number, score in enumerate(values)
    ]


HARD_AND_EASY = {
    "easy": {"dense": [1.0, 1.0, 0.0, 1.0], "ours 256": [1.0, 0.0, 0.0, 1.0]},
    "hard": {"dense": [0.0, 0.0, 0.0, 0.5], "ours 256": [1.0, 1.0, 1.0, 1.0]},
}
SPARSE = {"ours 256": 0.97}


def test_a_policy_is_compared_with_dense_sample_by_sample() -> None:
    found = change(answers(HARD_AND_EASY), "ours 256", [("easy", 4096)])
    assert found is not None
    assert (found.points, found.samples) == (-25, 4)
    assert found.low < -25 < found.high <= 0
    shuffled = random.Random(0).sample(answers(HARD_AND_EASY), 16)
    assert change(shuffled, "ours 256", [("easy", 4096)])[:1] == (-25,)  # type: ignore[index]
    assert change(answers(HARD_AND_EASY), "ours 512", [("easy", 4096)]) is None


def test_a_cell_that_dense_can_not_answer_is_listed_and_not_judged() -> None:
    assert judged(answers(HARD_AND_EASY)) == [("easy", 4096)]
    text = table(answers(HARD_AND_EASY), SPARSE)
    assert "| ours 256 | -25.0 (" in text
    assert "Listed, not judged (dense scores below 20 %): hard at 4,096." in text
    assert "| hard | not counted | 4,096 | 4 | 12 % | 100 % |" in text
    alone = table(answers({"hard": HARD_AND_EASY["hard"]}), SPARSE)
    assert "| ours 256 | no cell is judged | 0 |" in alone


def test_a_cell_at_the_limit_is_judged() -> None:
    assert judged(answers({"t": {"dense": [1.0, 0, 0, 0, 0]}})) == [("t", 4096)]


def test_lengths_and_sparse_steps_are_shares() -> None:
    found = answers(HARD_AND_EASY, {"dense": 8, "ours 256": 12})
    assert length_ratio(found, "ours 256", [("easy", 4096)]) == 1.5
    assert "| 1.50 | 97 % |" in table(found, SPARSE)


def test_dense_comes_first_among_the_arms() -> None:
    arms = arms_of(["ours", "window"], [256, 512], candidates=700)
    assert [arm.name for arm in arms] == ["dense", "ours 256", "ours 512", "window 256", "window 512"]
    assert arms[1].options == {"budget_tokens": 256, "candidate_tokens": 700}


def test_a_picture_has_a_row_per_task_and_depth() -> None:
    axes = heat_map(answers(HARD_AND_EASY)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["easy", "hard"]
    assert [text.get_text() for text in axes.texts] == ["75", "50", "12", "100"]


def request(question: list[int], known: int = 7) -> dict[str, Any]:
    """custom_params as SGLang hands them over, for a request of 7 prompt tokens of which `known` are in the batch."""
    req = SimpleNamespace(extend_end=known, full_untruncated_fill_ids=[0] * 7)
    return {"question": question, "__req__": req}


def test_a_question_is_forced_and_an_answer_is_not() -> None:
    torch.manual_seed(0)
    params = [request([3, 5]), request([9])]
    for step in range(4):
        logits = torch.randn(2, 20)
        found = ForcedQuestion()(logits.clone(), params)
        for row, forced in enumerate(([3, 5], [9])):
            if step < len(forced):
                assert found[row].argmax() == forced[step]
                assert found[row].isneginf().sum() == 19
            else:
                assert torch.equal(found[row], logits[row])


def test_a_chunk_of_a_prompt_is_no_step() -> None:
    params = [request([3], known=5)]
    assert torch.equal(ForcedQuestion()(torch.ones(1, 20), params), torch.ones(1, 20))
    params[0]["__req__"].extend_end = 7
    assert ForcedQuestion()(torch.ones(1, 20), params)[0].argmax() == 3


def test_sessions_ask_for_what_their_document_says(prompts: Prompts, tokenizer: Pieces) -> None:
    made = make_conversation(prompts, 1501, 0, sessions=3, turns=8, seed=7)
    assert made == make_conversation(prompts, 1501, 0, sessions=3, turns=8, seed=7)
    assert made.document != make_conversation(prompts, 1501, 1, sessions=3, turns=8, seed=7).document
    assert len(made.document) == 1501
    document = tokenizer.decode(made.document)
    orders = set()
    for session in made.sessions:
        asked = [turn.expected[0] for turn in session]
        assert len(set(asked)) == 8
        orders.add(tuple(asked))
        for turn in session:
            sentence = tokenizer.decode(turn.question).split("<assistant>")[1] + tokenizer.decode(turn.right)
            assert sentence in document
            assert turn.expected[0] in tokenizer.decode(turn.right)
            assert turn.expected[0] not in tokenizer.decode(turn.question)
    assert len(orders) == 3
    first, second = (tokenizer.decode(turn.question) for turn in made.sessions[0][:2])
    assert not first.startswith("<user>")
    assert second.startswith("<user>")


def test_later_turns_read_the_right_answers_or_their_own(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_conversation(prompts, 700, 0, sessions=1, turns=3, seed=7)
    turns, asked = made.sessions[0], []

    def ask(
        server: object, document: list[int], question: list[int], tokens: int, end: int, decoded: bool
    ) -> list[int]:
        asked.append(document)
        return [1, 2]

    monkeypatch.setattr("benchmarks.quality.turns.ask", ask)
    for own in (False, True):
        asked.clear()
        hold_session(None, made, turns, end=0, decoded=True, own_history=own)  # type: ignore[arg-type]
        said = [[1, 2] if own else turn.right for turn in turns]
        assert asked[0] == made.document
        assert asked[2] == made.document + turns[0].question + said[0] + turns[1].question + said[1]


def test_questions_recall_in_arms_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    dense, ours, again = recalling(arms_of(["ours"], [256]), 128)
    assert dense.policy == "dense" and again.options == ours.options | {"recall_extend_tokens": 128}
    assert "recall_extend_tokens" not in ours.options and len({dense.name, ours.name, again.name}) == 3
    with pytest.raises(SystemExit):
        parse_args(["--recall-extend", "128"])
    assert "--recall-extend needs --question prefilled" in capsys.readouterr().err


def test_a_missing_lm_eval_is_said_with_how_to_install_it() -> None:
    with pytest.raises(SystemExit, match=r"no_such_module.*pip install 'lm-eval\[api,ruler\]'"):
        optional("no_such_module")


def test_results_are_put_together(tmp_path: Path) -> None:
    files = []
    for number, (score, share) in enumerate([(1.0, 1.0), (0.0, 0.5)]):
        answers = [
            Answer("dense", "needle", 100, number, "-", f"d{number}", 1.0, 2, "x", ["x"]),
            Answer("ours 256", "needle", 100, number, "-", f"d{number}", score, 2, "x", ["x"]),
        ]
        found = {"answers": [answer._asdict() for answer in answers], "sparse_steps": {"ours 256": share}}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"results": found}))
    answers, sparse = read_answers(files)
    with pytest.raises(SystemExit, match="--first"):
        read_answers([*files, files[0]])
    assert len(answers) == 4 and sparse == {"ours 256": 0.5}
    found = change(answers, "ours 256", judged(answers))
    assert found is not None and (found.points, found.samples) == (-50.0, 2)


def test_later_samples_go_on_where_a_run_ended() -> None:
    prompts = SimpleNamespace(make=lambda *of: of)
    whole = make_samples(prompts, ["a", "b"], [10], 4)
    parts = [make_samples(prompts, ["a", "b"], [10], 2, first) for first in (0, 2)]
    assert sorted(whole) == sorted(parts[0] + parts[1])


def counted(tokens: list[int | None]) -> list[Answer]:
    """Dense's answers to prompts of so many tokens, where 4,096 were asked for."""
    return [answers({"t": {"dense": [1.0]}})[0]._replace(number=i, prompt_tokens=n) for i, n in enumerate(tokens)]


def test_a_row_begins_with_the_tokens_that_were_sent() -> None:
    assert "| t | 2,160 (2,140 to 2,180) | 4,096 | 3 |" in table(counted([2180, 2140, 2160]), {})
    assert "| t | 2,160 | 4,096 | 2 |" in table(counted([2160, 2160]), {})
    assert "| t | not counted | 4,096 | 2 |" in table(counted([2160, None]), {})


def test_a_prompt_is_the_document_with_its_question(prompts: Prompts, tokenizer: Pieces) -> None:
    arm = arms_of([], [])[0]
    assert answer_of(arm, prompts.make("needle", 700, 0), [], "").prompt_tokens == 700
    made = make_conversation(prompts, 700, 0, sessions=2, turns=3, seed=7)
    said = [[[1], [1, 1], [1]]] * 2
    for own in (False, True):
        found = answers_of(arm, made, said, tokenizer, own)
        for session, turns in enumerate(made.sessions):
            history = 700
            for i, turn in enumerate(turns):
                history += len(turn.question)
                (answer,) = (a for a in found if (a.task, a.column) == (f"turn {i + 1}", f"session {session + 1}"))
                assert answer.prompt_tokens == history
                history += len(said[session][i]) if own else len(turn.right)


class Task:
    """As one of lm-eval's: prompt n has 1,000 + n tokens, and the answer n."""

    def build_all_requests(self, samples: list[int], rank: int, world_size: int) -> None:
        self.instances = [
            SimpleNamespace(doc_id=i, doc={"outputs": [str(n)]}, args=("," * (1000 + n), {}))
            for i, n in enumerate(sorted(samples))
        ]


def test_prompts_of_a_result_are_counted_again(tokenizer: Pieces) -> None:
    def make(names: list[str], length: int) -> dict[str, Any]:
        return {name: {"tasks": {name: Task()}} for name in names}

    asked = [
        Answer(arm, task, length, number, "-", "", 1.0, 2, "x", [str(number)])
        for arm in ("dense", "ours 256")
        for task, length, number in [("a", 4096, 7), ("a", 4096, 3), ("b", 4096, 7), ("a", 7800, 30)]
    ]
    found = recount(asked, tokenizer, make)
    assert [answer.prompt_tokens for answer in found] == [1007, 1003, 1007, 1030] * 2
    assert [answer._replace(prompt_tokens=None) for answer in found] == asked
    with pytest.raises(SystemExit, match="another answer"):
        recount([asked[0]._replace(expected=["8"])], tokenizer, make)


def test_counts_are_put_beside_older_results(tmp_path: Path) -> None:
    old = answers({"t": {"dense": [1.0, 1.0], "ours 256": [1.0, 1.0]}})
    kept = [{k: v for k, v in answer._asdict().items() if k != "prompt_tokens"} for answer in old]
    result, counts = tmp_path / "result.json", tmp_path / "counts.json"
    result.write_text(json.dumps({"setting": "m, float32", "results": {"answers": kept, "sparse_steps": SPARSE}}))
    prompts = [{"task": "t", "length": 4096, "number": number, "tokens": 2000 + number} for number in (0, 1)]
    counts.write_text(json.dumps({"setting": "m's tokenizer", "results": {"model": "m", "prompts": prompts}}))
    for files in ([result, counts], [counts, result]):
        found, sparse = read_answers(files)
        assert [answer.prompt_tokens for answer in found] == [2000, 2001] * 2
        assert sparse == SPARSE
    assert read_answers([result])[0] == old
    counts.write_text(counts.read_text().replace('"m"', '"another"'))
    with pytest.raises(SystemExit, match="counts the tokens of another"):
        read_answers([result, counts])
