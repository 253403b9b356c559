"""What is refused where a scheduler receives it; test_flags.py sends it to a server.

The model of these tests is made up: its vocabulary is 50 to 99, so that ids below and beyond it are ids that any real model
serves.

Red when: an id at either end of the vocabulary is refused or one beyond it is not, something that a request says of itself
exempts it, a field's type is not looked at, one request of a batch is refused with the others, a refusal does not say what to
do or reaches nobody, a check that fails lets a request in or ends the scheduler, or what SGLang takes from callers in Python is
refused or changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from enum import StrEnum
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    FlushCacheReqInput,
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
    ResumeMemoryOccupationReqOutput,
    SessionParams,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.session.session_controller import Session, SessionController, SessionReqNode

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.serving import active, request_checks, scheduler_hooks
from sglang_clusterkv.serving.request_checks import Takes, problem_of, problem_of_ids, problem_of_types, takes_of

TAKES = Takes(range(50, 100), range(50, 100), frozenset({120}))
OUTSIDE = "Token id 100 is outside the model's vocabulary: use ids from 50 to 99."
EMPTY = "The prompt has no token: send at least one."


def request(ids: list[int] | None, *, rid: str = "a", **fields: Any) -> TokenizedGenerateReqInput:
    """As SGLang's tokenizer manager sends it."""
    made: dict[str, Any] = {
        "input_text": "",
        "input_ids": None if ids is None else array("q", ids),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    return TokenizedGenerateReqInput(rid=rid, **made | fields)


class Scheduler:
    """What the check reads of SGLang's, and whom it answered."""

    def __init__(self, *, multimodal: bool = False, added: int | None = None) -> None:
        self.model_config = SimpleNamespace(
            vocab_size=100,
            is_multimodal=multimodal,
            hf_text_config=SimpleNamespace(vocab_size=100),
            hf_config=SimpleNamespace(image_token_id=120, bos_token_id=1, video_token_index=121, model_type="x"),
        )
        adapters = None if added is None else SimpleNamespace(lora_added_tokens_size=added)
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=adapters))
        self.session_controller = SessionController(tree_cache=None)  # type: ignore[arg-type]
        self.answers: list[tuple[str, Any, str | None]] = []

    def send_abort_output(self, abort: Any, sender: Any) -> None:
        self.answers.append((abort.rid, abort.finished_reason, sender.http_worker_ipc))


def older_scheduler() -> Any:
    """SGLang 0.5.22's, which answers through its channel alone."""
    newer = Scheduler()
    older = SimpleNamespace(**vars(newer))
    older.ipc_channels = SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=newer.send_abort_output))
    return older


@pytest.mark.parametrize("ids", [[50], [99], [55, 50, 99]])
def test_ids_of_the_vocabulary_pass(ids: list[int]) -> None:
    assert problem_of_ids(array("q", ids), TAKES.ids) is None
    assert problem_of(request(ids), TAKES) is None


@pytest.mark.parametrize(("ids", "named"), [([49], 49), ([100], 100), ([53, 20_000, 54], 20_000), ([200, 10], 10)])
def test_other_ids_are_named_with_the_range(ids: list[int], named: int) -> None:
    expected = f"Token id {named} is outside the model's vocabulary: use ids from 50 to 99."
    assert problem_of_ids(array("q", ids), TAKES.ids) == problem_of_ids(ids, TAKES.ids) == expected


@pytest.mark.parametrize("ids", [[], None])
def test_no_token_is_refused(ids: list[int] | None) -> None:
    assert problem_of(request(ids), TAKES) == EMPTY


@pytest.mark.parametrize("ids", [[[55]], [55.0], ["55"]])
def test_what_is_not_a_list_of_whole_numbers_is_refused(ids: list[Any]) -> None:
    assert (
        problem_of_ids(ids, TAKES.ids)
        == "The prompt's token ids are not whole numbers in one list: send a list of ids."
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"session_id": "s"},
        {"session_params": SessionParams(id="s")},
        {"session_params": SessionParams(offset=3)},
        {"lora_id": "adapter"},
        {"cache_salt": "salt", "extra_key": "key"},
        {"sampling_params": SamplingParams(max_new_tokens=0)},
        {"token_type_ids": [0]},
        {"mm_inputs": SimpleNamespace(mm_items=[])},
    ],
)
def test_nothing_that_a_request_says_of_itself_exempts_its_ids(fields: dict[str, Any]) -> None:
    assert problem_of(request([55, 100], **fields), TAKES) == OUTSIDE


def test_a_sessions_history_may_be_the_whole_prompt() -> None:
    assert problem_of(request([], session_params=SessionParams(id="a")), TAKES) is None
    for other in ({"session_params": SessionParams()}, {"session_id": "a"}):
        assert problem_of(request([], **other), TAKES) == EMPTY
    # Whoever sets both goes by the radix tree's sessions, which put nothing before the ids.
    assert problem_of(request([], session_params=SessionParams(id="a"), session_id="a"), TAKES) == EMPTY
    assert problem_of(request(None, session_params=SessionParams(id="a")), TAKES) == EMPTY


@pytest.mark.parametrize(
    "fields",
    [
        {"input_embeds": [[0.0, 0.0]]},
        {"positional_embed_overrides": PositionalEmbeds(embeds=[torch.zeros(4)], positions=[0])},
        {"input_embeds": [[0.0, 0.0]], "session_params": SessionParams(id="a")},
    ],
)
def test_embeddings_are_refused_with_what_to_send_instead(fields: dict[str, Any]) -> None:
    assert problem_of(request([55], **fields), TAKES) == (
        "Embeddings as input are not served with --attention-backend clusterkv: send text or token ids."
    )


def test_scores_at_chosen_positions_are_refused() -> None:
    problem = problem_of(request([55, 56], token_indices_to_pool=[0]), TAKES)
    assert problem is not None and problem.startswith("Scores at chosen positions are not served")


def test_stop_tokens_count_where_a_least_length_keeps_them_from_being_answered() -> None:
    def sampling(least: int, *stops: int) -> dict[str, Any]:
        return {"sampling_params": SamplingParams(min_new_tokens=least, stop_token_ids=list(stops))}

    assert problem_of(request([55], **sampling(0, 100)), TAKES) is None
    assert problem_of(request([55], **sampling(4, 60)), TAKES) is None
    assert problem_of(request([55], **sampling(4, 60, 100)), TAKES) == "Stop t" + OUTSIDE[1:]


def test_no_more_likeliest_tokens_than_there_are() -> None:
    assert problem_of(request([55], top_logprobs_num=50), TAKES) is None
    assert problem_of(request([55], top_logprobs_num=51), TAKES) == "top_logprobs_num is 51: the model has 50 tokens."


def test_log_probabilities_begin_where_the_model_gives_some() -> None:
    assert problem_of(request([55], return_logprob=True, logprob_start_len=-1), TAKES) is None
    assert problem_of(request([55], logprob_start_len=-2), TAKES) is None
    problem = problem_of(request([55], return_logprob=True, logprob_start_len=-2), TAKES)
    assert problem == "logprob_start_len is -2: use -1 or more."


def test_a_pictures_placeholder_passes_with_what_sglang_made_of_the_picture() -> None:
    made = SimpleNamespace(mm_items=[])
    assert problem_of(request([55, 120], mm_inputs=made), TAKES) is None
    assert "Token id 120 is" in (problem_of(request([55, 120]), TAKES) or "")
    assert "Token id 121 is" in (problem_of(request([55, 120, 121], mm_inputs=made), TAKES) or "")


def test_what_a_model_takes_is_read_from_the_model() -> None:
    assert takes_of(Scheduler()) == Takes(range(100), range(100))
    assert takes_of(Scheduler(multimodal=True)).placeholders == {1, 120, 121}
    assert takes_of(Scheduler(added=0)).ids == takes_of(Scheduler(added=None)).ids == range(100)


def test_tokens_that_an_adapter_brings_pass() -> None:
    takes = takes_of(Scheduler(added=2))
    assert problem_of(request([101], lora_id="adapter"), takes) is None
    assert "Token id 102 is outside" in (problem_of(request([102], lora_id="adapter"), takes) or "")


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_checks, "takes_of", lambda scheduler: TAKES)
    monkeypatch.setattr(active, "active_config", ClusterKVConfig)


def replacing(rid: str | None, **fields: Any) -> TokenizedGenerateReqInput:
    return request([55], session_params=SessionParams(id="s", rid=rid, replace=True), **fields)


@pytest.mark.usefixtures("lowered")
def test_what_replaces_a_request_of_a_session_names_it() -> None:
    scheduler = Scheduler()
    assert request_checks.admit(scheduler, [replacing(None)]) == []
    ((_, said, _),) = scheduler.answers
    assert said["message"].startswith("The request replaces another one of its session: name that one by its rid")
    others = [request([55], session_params=SessionParams(id="s")), replacing("a"), replacing(None, session_id="t")]
    assert request_checks.admit(scheduler, others) == others


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize(("ids", "served"), [("bcd", True), ("bcb", False), ("bcx", False)])
def test_what_is_replaced_is_forgotten_by_ids_that_nobody_else_has(ids: str, served: bool) -> None:
    """x: whose id another one had that is forgotten."""
    scheduler = Scheduler()
    session = scheduler.session_controller.sessions["s"] = Session(0, "s")
    first = SessionReqNode(SimpleNamespace(rid="a"))  # type: ignore[arg-type]
    last = first
    for rid in ids:
        last = SessionReqNode(SimpleNamespace(rid=rid), last)  # type: ignore[arg-type]
        session.req_nodes |= {rid: last} if rid != "x" else {}
    session.req_nodes["a"] = first
    assert len(request_checks.admit(scheduler, [replacing("a"), replacing("nobody"), request([55])])) == 2 + served
    said = [reason["message"].startswith("Requests behind a had ids") for _, reason, _ in scheduler.answers]
    assert said == ([] if served else [True])


def reason(message: str) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": 400}


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("made_by", [Scheduler, older_scheduler])
def test_the_others_of_a_batch_go_on_and_the_refused_are_answered(made_by: Callable[[], Any]) -> None:
    scheduler = made_by()
    good, bad = request([55]), request([100], rid="b", http_worker_ipc="ipc")
    control = FlushCacheReqInput()
    batches = [BatchTokenizedGenerateReqInput(batch=made) for made in ([bad, good], [bad])]
    hooked = scheduler_hooks._before_requests(scheduler, [control, *batches, bad, good])
    assert hooked is not None
    (same, received), _ = hooked
    assert same is scheduler and received == [control, batches[0], good] and batches[0].batch == [good]
    assert scheduler.answers == [("b", reason(OUTSIDE), "ipc")] * 3


class Within(msgspec.Struct):
    """A record in a record."""

    depth: int = 0


class Made(msgspec.Struct):
    """A record of a few types."""

    text: str | None = None
    number: int = 0
    share: float = 1.0
    numbers: list[int] | None = None
    said: Literal["a", "b"] | bool = False
    flag: bool = False
    logit_bias: dict[str, float] | None = None
    custom_params: dict[str, str] | None = None
    sent: PositionalEmbeds | None = None
    sampling_params: Any = None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": ["a"]}, "text is of another type than it has to be: expected `str | null`, got `array`."),
        ({"text": 5.0}, "text is of another type than it has to be: expected `str | null`, got `float`."),
        ({"number": "5"}, "number is of another type than it has to be: expected `int`, got `str`."),
        ({"number": 5.5}, "number is of another type than it has to be: expected `int`, got `float`."),
        ({"numbers": [1, "2"]}, "numbers is of another type than it has to be: expected `int`, got `str` - at `$[1]`."),
        ({"said": "c"}, "said is of another type than it has to be: invalid enum value 'c'."),
        (
            {"custom_params": 5},
            "custom_params is of another type than it has to be: expected `object | null`, got `int`.",
        ),
        (
            {"sampling_params": Within(depth="5")},
            "depth is of another type than it has to be: expected `int`, got `str`.",
        ),
    ],
)
def test_what_is_of_another_type_than_a_record_declares_is_named(fields: dict[str, Any], said: str) -> None:
    assert problem_of_types(Made(**fields)) == said


def test_what_a_record_declares_passes_and_so_does_what_sglang_takes_besides() -> None:
    """Whatever is asked for its truth, null, ids as keys, any parameters, what is of no type of JSON."""
    made = Made(
        text="a", number=16.0, share=1, numbers=None, said="a", flag=5, logit_bias={5: 1, "6": 0.5},
        custom_params={"a": [object()]}, sent=object(), sampling_params=SamplingParams(n=2, stop_token_ids=[5, None]),
    )  # fmt: skip
    assert problem_of_types(made) is None and made.flag is True and (made.number, type(made.number)) == (16, int)
    assert problem_of_types(SimpleNamespace(text=[])) is None
    assert problem_of_types(request([55], session_params=SessionParams(id="s", offset=-3))) is None


class Choice(StrEnum):
    """A text of its own kind."""

    A = "a"


@pytest.mark.parametrize(
    "fields",
    [
        {"number": np.int64(5)},
        {"number": HTTPStatus.OK},
        {"number": torch.tensor(5)},
        {"share": np.float32(0.5)},
        {"share": np.float64(0.5)},
        {"share": 1},
        {"flag": np.bool_(False)},
        {"numbers": (1, np.int32(2))},
        {"numbers": np.arange(3)},
        {"numbers": {5}},
        {"text": Choice.A},
        {"text": np.str_("a")},
        {"logit_bias": {np.int64(5): np.float32(1), "6": True}},
    ],
)
def test_what_callers_in_python_have_reaches_sglang_as_it_is(fields: dict[str, Any]) -> None:
    made = Made(**fields)
    assert problem_of_types(made) is None
    assert all(getattr(made, name) is value for name, value in fields.items())


def test_true_is_a_number_where_one_is_asked_for() -> None:
    made = Made(number=True, share=False)
    assert problem_of_types(made) is None and [made.number, made.share] == [1, 0]
    assert not isinstance(made.number, bool) and not isinstance(made.share, bool)


def test_sampling_parameters_of_a_library_call_pass() -> None:
    sampling = SamplingParams(max_new_tokens=np.int64(16), temperature=np.float32(0.5), ignore_eos=np.bool_(True))
    sampling.normalize(None)
    assert problem_of_types(request([55], sampling_params=sampling)) is None


@pytest.mark.usefixtures("lowered")
def test_a_request_of_other_types_is_refused() -> None:
    scheduler = Scheduler()
    assert request_checks.admit(scheduler, [request([55], top_logprobs_num="many")]) == []
    (answer,) = scheduler.answers
    assert answer[1]["message"].startswith("top_logprobs_num is of another type")


def test_a_request_that_cannot_be_checked_is_refused() -> None:
    scheduler = Scheduler()
    del scheduler.model_config
    assert request_checks.admit(scheduler, [request([55])]) == []
    (answer,) = scheduler.answers
    assert answer[1]["message"].startswith("The request cannot be checked: ")


@pytest.mark.usefixtures("lowered")
def test_what_was_lent_with_a_refused_request_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    item = SimpleNamespace(release_transport_proxies=lambda: returned.append("item"))
    monkeypatch.setattr("sglang.srt.runtime_context.get_device", lambda: SimpleNamespace(gpu_id=3))
    monkeypatch.setattr(PositionalEmbeds, "reconstruct", lambda self, device: returned.append(device))
    overrides = PositionalEmbeds(embeds=[torch.zeros(4)], positions=[0])
    bad = request([55], mm_inputs=SimpleNamespace(mm_items=[item]), positional_embed_overrides=overrides)
    assert request_checks.admit(Scheduler(), [bad]) == []
    assert returned == ["item", 3]


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("by_channel", [False, True])
def test_on_our_cpu_platform_requests_for_memory_are_answered_and_go_no_further(
    monkeypatch: pytest.MonkeyPatch, by_channel: bool
) -> None:
    """by_channel: SGLang 0.5.22's, which answers through its channel alone."""
    answers: list[Any] = []

    def send(output: Any, sender: Any) -> None:
        answers.append((type(output), sender))

    channels = SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=send))
    scheduler: Any = SimpleNamespace(ipc_channels=channels) if by_channel else SimpleNamespace(send_control_output=send)
    release, resume = ReleaseMemoryOccupationReqInput(), ResumeMemoryOccupationReqInput(tags=["weights"])
    received = [release, FlushCacheReqInput(), resume]
    monkeypatch.setattr(scheduler_hooks, "_ours", True)
    hooked = scheduler_hooks._before_requests(scheduler, received)
    assert hooked is not None and hooked[0][1] == received[1:2]
    assert answers == [(ReleaseMemoryOccupationReqOutput, release), (ResumeMemoryOccupationReqOutput, resume)]
    monkeypatch.setattr(scheduler_hooks, "_ours", False)
    hooked = scheduler_hooks._before_requests(scheduler, received)
    assert hooked is not None and hooked[0][1] == received and len(answers) == 2


def test_other_backends_and_idle_rounds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_checks, "admit", None)
    monkeypatch.setattr(active, "active_config", lambda: None)
    assert scheduler_hooks._before_requests(Scheduler(), [request([55])]) is None
    monkeypatch.setattr(active, "active_config", ClusterKVConfig)
    assert scheduler_hooks._before_requests(Scheduler(), []) is None
