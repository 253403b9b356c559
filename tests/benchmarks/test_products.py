"""benchmarks/products.py: what its kinds multiply, and what its table says.

Red when: kinds are of other products, a kind's bytes are not what it reads, or channels that have no copy are measured.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.products import Weights, main


def test_all_kinds_are_of_the_same_product() -> None:
    weights = Weights(64, 64 * 4 * 50)
    calls = weights.calls(3)
    results = [call() for call, _ in calls.values()]
    assert results[0].shape == (3, 50) and torch.equal(results[1], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert [nbytes for _, nbytes in calls.values()] == [12_800, 12_800, 6_400]


def test_the_table_has_a_row_for_each_cell(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--channels", "64", "96", "--tokens", "1", "8", "--threads", "1", "2", "--megabytes", "1", "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 64"] * 4 + ["| 96"] * 4
    with pytest.raises(ValueError, match="multiple of 32"):
        main(["--channels", "65"])
