"""`benchmarks.tracing --server`: what the others' tokens take, from when all decode until one of them ends.

Red when: time before or behind that counts, or a pause of the server does not; the traced request is none, or not the last one.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import tracing


def test_time_per_token_is_that_of_the_moments_which_all_share() -> None:
    steady = [0.1 * number for number in range(21)]
    late = [1.0 + 0.1 * number for number in range(31)]
    assert tracing.token_ms([steady, late], 1.0) == pytest.approx(100)
    paused = [moment + (0.5 if moment > 1.5 else 0) for moment in late]
    assert tracing.token_ms([paused], 1.0) == pytest.approx(1000 * 3.5 / 30)
    fast_before = [*(0.01 * number for number in range(50)), *late]
    assert tracing.token_ms([fast_before], 1.0) == pytest.approx(100)


@pytest.mark.parametrize("traced", [False, True])
def test_one_request_more_is_traced_and_ends_first(traced: bool) -> None:
    asked: list[tuple[int, int, dict[str, Any]]] = []

    class Server:
        def stream(self, prompt: list[int], tokens: int, **sampling: Any) -> list[float]:
            asked.append((prompt[-1], tokens, sampling))
            return [0.0, *(0.2 + 0.05 * number for number in range(tokens))]

    assert tracing.beside(Server(), [1, 2, 3], 3, 40, traced=traced) == pytest.approx(50)  # type: ignore[arg-type]
    *others, last = sorted(asked, key=lambda one: one[0])
    assert [one[1:] for one in others] == [(40, {})] * 3 and len({one[0] for one in asked}) == 4
    assert last[1] < 40 and last[2] == ({"custom_params": {"clusterkv_trace": True}} if traced else {})
