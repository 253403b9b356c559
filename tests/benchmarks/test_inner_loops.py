"""Instructions are those of the loop over rows, for each row, and inner loops count as often as they run.

Red when: the wrapper for Python is counted, a label or directive is, a turn of several rows is taken for one, or a product of
the kernels is not in the table.
"""

from __future__ import annotations

import pytest

from benchmarks.inner_loops import instructions_a_row, products

LOOP = """
\txorl\t%ebx, %ebx
.LBB0_1:
\tvmovups\t(%rax), %zmm0
\tleaq\t4(%rbx), %rcx
.LBB0_2:
\tvaddps\t%zmm0, %zmm1, %zmm1 # a comment
\tcmpq\t$64, %rdx
\tjb\t.LBB0_2
\t.p2align\t4
\tcmpq\t$252, %rbx
\tmovq\t%rcx, %rbx
\tjb\t.LBB0_1
\tretq
.Lfunc_end0:
.LBB1_1:
"""
WRAPPER = "\n".join(["\tnop"] * 90) + "\n\tcmpq\t$8, %rbx\n\tjb\t.LBB1_1\n"


@pytest.mark.parametrize(("scales", "instructions"), [(1, 8), (2, 11)])
def test_a_loop_over_rows(scales: int, instructions: int) -> None:
    assert instructions_a_row(LOOP + WRAPPER, scales) == instructions / 4


def test_a_counter_that_is_raised_in_place() -> None:
    loop = ".LBB0_1:\n\tincq\t%rdx\n\tvmovups\t%zmm0, (%rax)\n\tcmpq\t$256, %rdx\n\tjne\t.LBB0_1\n.Lfunc_end0:\n"
    assert instructions_a_row(loop, 2) == 4


def test_products_of_every_operation() -> None:
    names = {product.name.split(":")[0] for product in products(64, 3)}
    assert names == {"score", "refine", "attend", "estimate"}
