"""What is refused before it reaches the scheduler; test_abuse.py sends it to a server.

Red when: an id at either end of the vocabulary is refused, one beyond it is not, or the sentence does not say what to do.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_clusterkv.serving import active, request_checks
from sglang_clusterkv.serving.request_checks import problem_of


@pytest.mark.parametrize("ids", [[0], [99], [5, 0, 99]])
def test_ids_of_the_vocabulary_pass(ids: list[int]) -> None:
    assert problem_of(ids, 100) is None


@pytest.mark.parametrize(
    ("ids", "named"), [([-1], "-1"), ([100], "100"), ([3, 2**40, 4], str(2**40)), ([200, -5], "-5")]
)
def test_other_ids_are_named_with_the_range(ids: list[int], named: str) -> None:
    assert problem_of(ids, 100) == f"Token id {named} is outside the model's vocabulary: use ids from 0 to 99."


@pytest.mark.parametrize("ids", [[], None])
def test_no_token_is_refused(ids: list[int] | None) -> None:
    assert problem_of(ids, 100) == "The prompt has no token: send at least one."


@pytest.mark.parametrize(
    ("images", "embeds", "chosen"), [(True, None, True), (False, [[0.0]], True), (False, None, False)]
)
def test_inputs_of_other_kinds_and_other_backends_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, images: bool, embeds: list[list[float]] | None, chosen: bool
) -> None:
    monkeypatch.setattr(active, "active_config", lambda: object() if chosen else None)
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))
    request = SimpleNamespace(contains_mm_input=lambda: images, input_embeds=embeds)
    request_checks._before_validation(manager, request, [-1])
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        monkeypatch.setattr(active, "active_config", object)
        request = SimpleNamespace(contains_mm_input=lambda: False)
        request_checks._before_validation(manager, request, [-1])


def test_a_sessions_history_may_be_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "active_config", object)
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))
    request = SimpleNamespace(contains_mm_input=lambda: False, session_params={"id": "a"})
    request_checks._before_validation(manager, request, [])
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        request_checks._before_validation(manager, request, [100])
