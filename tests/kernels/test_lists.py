"""A CPU's lists of a step are those of `kernels.lists.reference.sparse_step`.

Red when: one of them differs, in a number, its shape or its type; or a wrong border reaches compiled code.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.lists.cpu import make
from sglang_clusterkv.kernels.lists.reference import sparse_step
from tests.memory.test_step import borders_of, random_batch, table_of


@pytest.mark.parametrize("page_size", [16, 32])
def test_lists_are_the_references(page_size: int) -> None:
    generator = random.Random(page_size)
    table = table_of(6, page_size)
    for _ in range(60):
        batch, spare = random_batch(generator, page_size), generator.randint(0, 2)
        borders = borders_of(batch, spare)
        ids = np.arange(borders.begin.size).reshape(borders.begin.shape) % 7  # some are shared
        for one in (borders, borders._replace(ids=ids)):
            found, expected = make(one, table, page_size)._asdict(), sparse_step(one, table, page_size)._asdict()
            for name, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(found[name], value) and found[name].dtype is value.dtype, name
                elif isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(found[name], value, err_msg=name)
                elif name == "shared" and value is not None:
                    for mine, theirs in zip(found[name], value, strict=True):
                        np.testing.assert_array_equal(mine, theirs)
                else:
                    assert found[name] == value, name


def test_a_border_behind_its_request_is_an_error() -> None:
    generator, page_size = random.Random(3), 16
    table = table_of(6, page_size)
    found = 0
    while found < 20:
        borders = borders_of(random_batch(generator, page_size), 0)
        with_segments = np.flatnonzero(borders.recallable)
        if len(with_segments):
            row = int(with_segments[0])
            last = int(borders.recallable[row]) - 1
            borders.begin[row, last] = borders.seq_lens[row]  # its tokens would lie behind the last one
            with pytest.raises(IndexError, match="behind its request"):
                make(borders, table, page_size)
            found += 1
