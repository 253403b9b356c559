"""Products of many tokens are those of torch, and a token's are the same whatever the others are.

Red when: a product misses a row, a token, channels or the bias; what a token gets depends on the tokens beside it, or on
threads.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from sglang_clusterkv.kernels import token_tiles_cpu
from sglang_clusterkv.kernels.threads_cpu import set_threads
from sglang_clusterkv.kernels.token_tiles_cpu import linear_by_tiles


@pytest.mark.parametrize("tokens", [0, 1, 9, 17, 48, 100])
@pytest.mark.parametrize(("rows", "channels"), [(5, 33), (200, 1100)])
@pytest.mark.parametrize("tiles", [1, 10])
def test_products_are_of_all_rows_with_all_tokens(tokens: int, rows: int, channels: int, tiles: int) -> None:
    x, weight, bias = torch.randn(tokens, channels), torch.randn(rows, channels), torch.randn(rows)
    with patch.object(token_tiles_cpu, "_TILES", tiles):
        for more in (None, bias):
            expected = F.linear(x.double(), weight.double(), None if more is None else more.double())
            found = linear_by_tiles(x, weight, more)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-4)


def test_what_a_token_gets_depends_on_neither_the_others_nor_threads() -> None:
    x, weight, bias = torch.randn(70, 1100), torch.randn(300, 1100), torch.randn(300)
    whole = linear_by_tiles(x, weight, bias)
    for count in (1, 2, 5):
        set_threads(count)
        for begin, end in ((0, 70), (3, 20), (20, 53), (69, 70)):
            assert torch.equal(linear_by_tiles(x[begin:end], weight, bias), whole[begin:end])
    set_threads(None)
