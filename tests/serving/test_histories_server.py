"""`reproducible: true` on a real server: what was served before a prompt does not show in its answer.

Red when: after the prompt's half, after itself, after more of it, after a branch or a chat over its beginning, a greedy token
is another one than after a flush, or its log-probability is off by more than 1e-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import Server, serve
from tests.support.servers import ASLEEP
from tests.support.traffic import prompt

pytestmark = [pytest.mark.server, pytest.mark.long]

LENGTHS = (2601, 2608)  # the second is whole pages
TEXT = prompt(1, 3300)


def answer(server: Server, ids: list[int], tokens: int = 12) -> list[tuple[int, float]]:
    """Greedy tokens with their log-probabilities."""
    found: dict[str, Any] = server.generate(ids, tokens, return_logprob=True)
    return [(token, logprob) for logprob, token, _ in found["meta_info"]["output_token_logprobs"]]


def test_answers_are_those_after_a_flush(tiny: Path, tmp_path: Path) -> None:
    config = {"budget_tokens": 256, "reproducible": True}
    with serve(tiny, tmp_path / "server.log", "--max-total-tokens", "16000", ASLEEP, config=config) as server:
        for length in LENGTHS:
            ids = TEXT[:length]
            server.flush()
            cold = answer(server, ids)
            said = [token for token, _ in answer(server, ids[:1500], 40)]
            chat = [*ids[:1500], *said, *prompt(2, 900)]
            server.flush()
            cold_chat = answer(server, chat)
            histories = {
                "the half": [ids[: length // 2]],
                "itself": [ids],
                "more": [TEXT],
                "a branch": [ids[: length // 3] + prompt(3, 700)],
                "thirds, more and a branch": [
                    ids[: length // 3],
                    ids[: 2 * length // 3],
                    TEXT,
                    ids[:2000] + prompt(4, 50),
                ],
            }
            for name, history in histories.items():
                server.flush()
                for before in history:
                    answer(server, before, 30)
                assert_equal(answer(server, ids), cold, f"{length} tokens after {name}")
            server.flush()
            assert [token for token, _ in answer(server, ids[:1500], 40)] == said
            assert_equal(answer(server, chat), cold_chat, "a chat's next turn")
        counts = server.counts()
        assert counts["sparse_steps"] > 0 and counts["forced_borders"] == 0 and not counts["faults"], counts


def assert_equal(found: list[tuple[int, float]], expected: list[tuple[int, float]], said: str) -> None:
    """The same tokens, and their log-probabilities but for rounding."""
    assert [token for token, _ in found] == [token for token, _ in expected], f"{said}: {found}, cold {expected}"
    off = max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert off < 1e-4, f"{said}: log-probabilities are {off:.2g} off"
