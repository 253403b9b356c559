"""The online softmax of the Triton kernels, and how a program leaves its part of an attention.

Inside a kernel logits are in base 2, for that is what the hardware's exponential takes; log-sum-exps that leave it are natural.
Sums are float32. Parts are normalised, so that merging them needs their log-sum-exps alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: the difference of two of them is no NaN


# As is written: whether Triton's interpreter runs this module's kernels, which knows no assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp2(x):
    """2^x in one instruction, 0 below 2^-126: with smaller numbers kept it would be four."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log2(x):
    """Base-2 logarithm in one instruction, within 2^-22; of numbers that are no denormals."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def raise_peak(peak, logits):
    """(new peak [G], factor of what was summed before [G], weights [G, N]) of logits [G, N], -inf where there is nothing."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    return higher, exp2(peak - higher), exp2(logits - higher[:, None])


@triton.jit
def add_tile(sums, peak, weight, logits, rows, DOT: tl.constexpr):
    """One step: sums [G, D] and weight [G], relative to exp2(peak [G]), take in rows [N, D] with logits [G, N]."""
    peak, keep, part = raise_peak(peak, logits)
    sums = tl.dot(part.to(DOT), rows.to(DOT), sums * keep[:, None], input_precision="ieee")
    return sums, peak, weight * keep + tl.sum(part, 1)


@triton.jit
def normalise(sums, weight):
    """sums [G, D] over weight [G]; 0 where there is no weight."""
    return sums / tl.where(weight > 0, weight, 1.0)[:, None]


@triton.jit
def natural_lse(peak, weight):
    """Log-sum-exp [G] in base e; -inf where there is no weight."""
    return tl.where(weight > 0, (peak + tl.log2(tl.maximum(weight, 1e-37))) * LN_2, float("-inf"))
