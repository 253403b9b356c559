"""The pieces of benchmarks/forced.py that measure; a server run checks itself (benchmarks/chat.py reads the dense one twice).

Red when: a step's row is lost, doubled or written under another request, a chunk of a prompt counts as a step, another token
than the given one is left to choose, or a KL or its interval is not what its formula says.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.forced import ForcedText, interval, kl_divergence, mean, paired_ratio, parts_of

VOCABULARY = 50


def request(file: Path, answer: list[int], known: int = 7) -> dict[str, Any]:
    """custom_params as SGLang hands them over, for a request of 7 prompt tokens of which `known` are in the batch."""
    req = SimpleNamespace(extend_end=known, full_untruncated_fill_ids=[0] * 7)
    return {"file": str(file), "answer": answer, "__req__": req}


def test_each_step_is_written_and_its_token_forced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    params = [request(tmp_path / "a", [3, 5, 8]), request(tmp_path / "b", [9, 1, 1])]
    steps = [torch.randn(2, VOCABULARY) for _ in range(3)]
    for i, logits in enumerate(steps):
        forced = ForcedText()(logits.clone(), params)
        assert forced.argmax(1).tolist() == [params[0]["answer"][i], params[1]["answer"][i]]
    for j, name in enumerate("ab"):
        rows = np.fromfile(tmp_path / name, dtype=np.float32).reshape(3, VOCABULARY)
        expected = torch.log_softmax(torch.stack([logits[j] for logits in steps]).double(), -1).numpy()
        np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_a_chunk_of_a_prompt_is_no_step(tmp_path: Path) -> None:
    params = request(tmp_path / "a", [3])
    params["__req__"].extend_end = 4
    ForcedText()(torch.zeros(1, VOCABULARY), [params])
    assert not (tmp_path / "a").exists()
    params["__req__"].extend_end = 7
    assert ForcedText()(torch.zeros(1, VOCABULARY), [params]).argmax() == 3


def test_a_step_too_many_is_ignored(tmp_path: Path) -> None:
    params = request(tmp_path / "a", [3])
    for _ in range(2):
        ForcedText()(torch.zeros(1, VOCABULARY), [params])
    assert np.fromfile(tmp_path / "a", dtype=np.float32).size == VOCABULARY


def test_sglang_can_carry_the_processor() -> None:
    assert isinstance(ForcedText.from_str(ForcedText.to_str()), ForcedText)


def test_kl_is_that_of_two_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    assert kl_divergence(np.log(p), np.log(p)) == 0
    assert kl_divergence(np.log(p), np.log(q))[0] == pytest.approx(0.25 * np.log(2))


def test_a_ratio_is_paired_by_part_and_of_sums() -> None:
    one = [np.array([1.0, 3.0, 10.0, 30.0]), np.array([0.5, 0.5])]
    assert [len(part) for part in parts_of(one, 2)] == [2, 2, 2]
    assert paired_ratio([2 * values for values in one], one, 2) == (2.0, 2.0, 2.0), "the same in every part"
    found = paired_ratio([np.array([1.0, 1.0]), np.array([3.0])], [np.array([1.0, 1.0]), np.array([1.0])], 2)
    assert found.value == pytest.approx(5 / 3) and found.low == 1.0 and found.high == 3.0
    assert str(found) == "1.67 (1.00 to 3.00)"


def test_an_interval_is_of_groups_not_of_values() -> None:
    rng = np.random.default_rng(1)
    groups = [np.full(50, rng.normal()) for _ in range(20)]  # 1,000 values, but only 20 independent ones
    low, high = interval(groups)
    assert low < mean(groups) < high
    assert 0.6 < (high - low) / (2 * 1.96 * np.std([group[0] for group in groups]) / 20**0.5) < 1.4
