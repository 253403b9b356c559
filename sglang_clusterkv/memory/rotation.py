"""The fixed rotation applied to key residuals before they are coded: random signs, then a Hadamard transform.

A rotation spreads a residual's energy evenly over its channels, so that one scale and one or two bits per channel describe
it (RaBitQ, arXiv 2405.12497, section 3).
"""

from __future__ import annotations

import functools

import torch

# 256 random bits, bit d gives the sign of channel d (modulo 256). A constant: codes written once must stay readable.
_SIGN_BITS = 0x9E3779B97F4A7C15F39CC0605CEDC8341082276BF3A27251F86C6A11D0C18E95


def rotation_signs(head_dim: int) -> torch.Tensor:
    """Signs of the rotation, float32 [head_dim] of +1 and -1."""
    return torch.tensor([1.0 - 2.0 * ((_SIGN_BITS >> (d % 256)) & 1) for d in range(head_dim)])


@functools.cache
def rotation_matrix(head_dim: int, device: str = "cpu") -> torch.Tensor:
    """R = H diag(signs) / sqrt(block), float32 [head_dim, head_dim]; rotate rows with `x @ R.T`.

    `block` is the largest power of two that divides head_dim; H is block-diagonal (Sylvester's construction).
    """
    block = head_dim & -head_dim
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < block:
        hadamard = torch.cat(
            (torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)),
        )
    blocks = torch.block_diag(*[hadamard] * (head_dim // block))
    return (blocks * rotation_signs(head_dim) / block**0.5).to(device)
