"""SGLang's own attention unit kit, for the registered name "clusterkv" (it brings a stock pool, so all of it is dense).

Red when: the backend's prefill or decode differs from the kit's expectation, or the kit finds no backend of that name.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def kit() -> Iterator[object]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention

    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield dense_attention
    torch.set_grad_enabled(before)


def test_every_dense_case_of_the_kit_passes(kit: object) -> None:
    cases = kit.make_dense_cases("clusterkv")  # type: ignore[attr-defined]
    assert len(cases) >= 12
    worst = {}
    for case in cases:
        fixture = kit.build_dense_attention_fixture(None, case, device="cpu", dtype=torch.float32)  # type: ignore[attr-defined]
        actual = kit.run_dense_fixture_eager(fixture)  # type: ignore[attr-defined]
        expected = kit.expected_dense_fixture_output(fixture)  # type: ignore[attr-defined]
        worst[case.name] = (actual - expected).abs().max().item()
    assert max(worst.values()) < 1e-5, worst
