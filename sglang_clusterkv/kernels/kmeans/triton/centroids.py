"""Centroids in the kernels of k-means: stored as two bf16 that sum to one, and compared with rows by tensor cores."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_DOT = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16  # the interpreter multiplies the bits of bf16


@triton.jit
def store_centroids(centroids_ptr, norms_ptr, place, mask, centroids, channels, D: tl.constexpr):
    """Store fp32 [clusters, channels] as two bf16 that sum to it up to 2^-16, and its squared length."""
    high = centroids.to(tl.bfloat16)
    target = centroids_ptr + place[:, None] * (2 * D) + channels[None, :]
    both = mask[:, None] & (channels < D)[None, :]
    tl.store(target, high, mask=both)
    tl.store(target + D, (centroids - high.to(tl.float32)).to(tl.bfloat16), mask=both)
    tl.store(norms_ptr + place, tl.sum(centroids * centroids, 1), mask=mask)


@triton.jit
def scores_of(
    x_high, x_low, centroids_ptr, norms_ptr, cluster, count, channels, D: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """2 x.c - |c|^2 of rows x against some centroids, [rows, clusters]; -inf past the last cluster.

    A row is the sum of two bf16, as centroids are stored, and the product of the two small parts is left out: 16 bits of
    mantissa.
    """
    source = centroids_ptr + cluster[None, :] * (2 * D) + channels[:, None]
    mask = (cluster < count)[None, :] & (channels < D)[:, None]
    high = tl.load(source, mask=mask, other=0.0).to(DOT)
    low = tl.load(source + D, mask=mask, other=0.0).to(DOT)
    norm = tl.load(norms_ptr + cluster, mask=cluster < count, other=float("inf"))
    dot = tl.dot(x_low.to(DOT), high)
    dot = tl.dot(x_high.to(DOT), low, dot)
    dot = tl.dot(x_high.to(DOT), high, dot)
    return 2.0 * dot - norm[None, :]


def scoring_constants(head_dim: int) -> dict[str, Any]:
    """A kernel's constants for `scores_of`; at head_dim 256, steps of 32 centroids spill registers on sm_80."""
    return {"CENTROIDS": 16 if head_dim > 128 else 32, "DOT": _DOT}


def scoring_options(head_dim: int) -> dict[str, int]:
    """Of a launch whose programs score ROWS rows."""
    return {"num_warps": 8 if head_dim > 128 else 4, "num_stages": 2}
