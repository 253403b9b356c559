"""The comparison of recalled extends with exact ones, without a server.

Red when: an arm recalls that should not, or reads another text; rows of the extend and of decode steps are mixed up; a later
turn's KL stands in the row of earlier ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.quality import extends
from benchmarks.quality.extends import ARMS, DENSE, EXACT, RECALLED, measure, parse_args, table


def rows_of(surprise: list[float]) -> np.ndarray:
    """Log-probabilities over two tokens, whose KL from an even choice is log cosh of the surprise."""
    x = np.array(surprise)
    return np.stack([x, -x], 1) - np.log(2 * np.cosh(x))[:, None]


def test_all_arms_read_one_text_and_rows_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse_args(["--prompt", "100", "--turns", "4", "--question", "5", "--answer", "3", "--recall", "30"])
    asked: dict[str, list[tuple[list[int], list[int]]]] = {arm: [] for arm in ARMS}
    now: dict[str, Any] = {"arm": DENSE, "extends": 0}
    options: list[dict[str, Any]] = []

    class Server:
        def flush(self) -> None: ...

        def generate(self, *_: Any) -> None: ...

        def counts(self) -> dict[str, Any]:
            names = ("sparse_steps", "recalled_extends", "recalled_extend_tokens")
            return dict.fromkeys(names, now["extends"]) | {"host_tier": {"read_bytes_prefill": 10**6 * now["extends"]}}

    def use(_: Any, policy: str, **given: Any) -> None:
        options.append(given)
        now["arm"] = DENSE if policy == DENSE else RECALLED if given["recall_extend_tokens"] else EXACT

    def forced(_: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
        asked[now["arm"]].append((prompt, answer))
        now["extends"] += now["arm"] == RECALLED
        turn = len(asked[now["arm"]])
        return rows_of({DENSE: [0.0, 0, 0], EXACT: [0.0, 0.1, 0.1], RECALLED: [1.0 * turn, 0.2, 0.2]}[now["arm"]])

    monkeypatch.setattr(extends, "use", use)
    monkeypatch.setattr(extends, "forced_decode", forced)
    found = measure(Server(), list(range(200)), args)  # type: ignore[arg-type]
    assert asked[DENSE] == asked[EXACT] == asked[RECALLED] and len(asked[DENSE]) == 4
    assert asked[DENSE][1] == (list(range(113)), [113, 114, 115])
    assert {given["recall_extend_tokens"] for given in options} == {0, 30}
    text = table([found], {arm: [0.2, 0.1] for arm in ARMS})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "to" in line][1:4]
    assert [row[0] for row in cells] == ["1 to 2", "3 to 4", "1 to 4"]
    assert [float(row[4]) for row in cells] == pytest.approx(
        [np.mean(np.log(np.cosh(turns))) for turns in ([1, 2], [3, 4], [1, 2, 3, 4])], abs=1e-5
    )
    assert all(float(row[5].split()[0]) == pytest.approx(np.log(np.cosh(0.2)), abs=1e-5) for row in cells)
    assert f"| {RECALLED} | 0.100 | 0.150 | 4.0 | 0.0 |" in text and "4 new tokens recalled" in text


def test_an_arm_that_could_not_recall_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--question", "48", "--recall", "64"])
    assert "--recall must be at least 65" in capsys.readouterr().err
