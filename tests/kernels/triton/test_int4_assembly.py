"""The assembly that unpacks int4 rows and 2-bit codes on a GPU, read as PTX defines its instructions.

Red when: a nibble or a crumb gets into another slice or word, a sign is lost, or a level is not exact. (Triton's interpreter
does not run assembly: it unpacks word by word, which the kernels' tests compare with the references.)
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.triton_rows import _code_assembly, _int4_assembly
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec


def run(assembly: str, inputs: list[np.ndarray], dtype: torch.dtype) -> list[np.ndarray]:
    """The eight result registers, uint32 [n], for one or two input registers."""
    registers = {f"${8 + at}": values.astype(np.uint64) for at, values in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(registers["$8"], int(name, 0))

    def halves(x: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy((x >> s & 0xFFFF).astype(np.uint16)).view(dtype).double() for s in (0, 16)]

    for line in assembly.strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name.startswith(".reg"):
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        if name == "mov.b32":
            result = value(sources[0])
        elif name == "prmt.b32":
            both, chosen = value(sources[0]) | value(sources[1]) << np.uint64(32), value(sources[2])
            digits = [chosen >> np.uint64(4 * byte) & np.uint64(15) for byte in range(4)]
            assert all((digit < 8).all() for digit in digits), "a digit above 7 repeats a sign"
            taken = [both >> np.uint64(8) * digit & np.uint64(255) for digit in digits]
            result = sum(part << np.uint64(8 * byte) for byte, part in enumerate(taken))
        elif name == "shr.u32":
            result = value(sources[0]) >> value(sources[1])
        elif name == "and.b32":
            result = value(sources[0]) & value(sources[1])
        elif name == "mad.lo.u32":
            result = value(sources[0]) * value(sources[1]) + value(sources[2]) & np.uint64(0xFFFFFFFF)
        elif name == "lop3.b32":
            a, b, c = map(value, sources[:3])
            table, result = int(sources[3], 0), np.zeros_like(a)
            for row in range(8):
                if table >> row & 1:
                    terms = [x if row >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
                    result |= terms[0] & terms[1] & terms[2]
            result &= np.uint64(0xFFFFFFFF)
        else:
            assert re.fullmatch(r"fma\.rn\.b?f16x2", name), name
            parts = [(x * y + z).to(dtype) for x, y, z in zip(*map(halves, map(value, sources)), strict=True)]
            low, high = (part.view(torch.uint16).numpy().astype(np.uint64) for part in parts)
            result = low | high << np.uint64(16)
        registers[target] = result
    return [registers[f"${j}"] for j in range(8)]


@pytest.mark.parametrize(
    ("dtype", "assembly"),
    [
        (torch.bfloat16, _int4_assembly(0x4300, 0xC308, "fma.rn.bf16x2")),
        (torch.float16, _int4_assembly(0x6400, 0xE408, "fma.rn.f16x2")),
    ],
)
def test_the_assembly_unpacks_all_levels_of_two_words(dtype: torch.dtype, assembly: str) -> None:
    packed = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = RowCodec("int4", 128).decode(packed, torch.ones(64, 4, dtype=torch.bfloat16))
    assert expected.unique().tolist() == list(range(-8, 8))
    words = packed.view(torch.int32).numpy().view(np.uint32)
    for j, register in enumerate(run(assembly, [words[0::2].ravel(), words[1::2].ravel()], dtype)):
        for half, rows in ((0, expected[0::2]), (16, expected[1::2])):
            found = torch.from_numpy((register >> np.uint64(half) & np.uint64(0xFFFF)).astype(np.uint16)).view(dtype)
            assert torch.equal(found.float(), rows.unflatten(1, (8, 16))[:, j].flatten()), (j, half)


def test_the_assembly_looks_up_all_levels_of_two_codes() -> None:
    packed = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = TokenCodec(2, 128).decode(packed, torch.ones(64, dtype=torch.bfloat16)).half()
    assert len(expected.unique()) == 4
    pairs = packed.view(torch.int32).numpy().view(np.uint32)  # a code's words i and i + 1, for even i
    for j, register in enumerate(run(_code_assembly(), [pairs.ravel()], torch.float16)):
        for half, at in ((0, 0), (16, 1)):
            found = torch.from_numpy((register >> np.uint64(half) & np.uint64(0xFFFF)).astype(np.uint16)).view(
                torch.float16
            )
            assert torch.equal(found, expected.unflatten(1, (8, 16))[:, j, at::2].flatten()), (j, half)
