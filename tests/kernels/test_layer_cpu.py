"""What stands around attention in a decode step is computed as torch's operations would.

Red when: a token's norm, gate or rotation is another token's, a sum is not kept, channels that are not rotated change, a
head's place in a wider product is taken for its place alone, or either way to pair channels is the other.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang_clusterkv.kernels.layer_cpu import rms_norm, rotate, silu_and_mul


@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (2, 3, 40), (0, 32)])
def test_a_norm_is_over_the_last_channels(shape: tuple[int, ...]) -> None:
    x, added, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    for more in (None, added):
        whole = x if more is None else x + more
        out, kept = rms_norm(x, more, weight, 1e-5)
        torch.testing.assert_close(out, F.rms_norm(whole, shape[-1:], weight, 1e-5), rtol=1e-5, atol=1e-6)
        assert kept is None if more is None else torch.equal(kept, whole)


def test_a_gate_is_of_the_first_half() -> None:
    x = 20 * torch.randn(3, 200)
    x[0, :4] = torch.tensor([0.0, 100.0, -100.0, -80.0])
    torch.testing.assert_close(silu_and_mul(x), F.silu(x[:, :100]) * x[:, 100:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("turned", [16, 8])
def test_each_head_is_rotated_by_its_tokens_position(halves: bool, turned: int) -> None:
    channels, heads = 16, 3
    product = torch.randn(4, 100)
    x, positions = product[:, 20 : 20 + heads * channels], torch.tensor([5, 0, 63, 5])
    angles = torch.rand(64, turned // 2) * 6
    turns = torch.cat((angles.cos(), angles.sin()), 1)
    found = rotate(x, positions, turns, channels, halves=halves)
    for token in range(4):
        for head in range(heads):
            before = x[token, head * channels : (head + 1) * channels].double()
            after = found[token, head * channels : (head + 1) * channels].double()
            assert torch.equal(after[turned:], before[turned:])
            for pair in range(turned // 2):
                a, b = (pair, turned // 2 + pair) if halves else (2 * pair, 2 * pair + 1)
                turn = torch.polar(torch.ones((), dtype=torch.float64), angles[positions[token], pair].double())
                expected = torch.complex(before[a], before[b]) * turn
                torch.testing.assert_close(torch.complex(after[a], after[b]), expected, rtol=1e-5, atol=1e-5)
