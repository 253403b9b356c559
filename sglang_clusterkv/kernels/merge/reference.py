"""Merge: two partial attentions, as attend and estimate leave them, by their log-sum-exps; and how much of the mass was read
exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over a part of the tokens."""

    output: torch.Tensor  # float32 [B, H, G, D], normalised over the part
    lse: torch.Tensor  # float32 [B, H, G], log-sum-exp of the part's logits


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over both parts. A part with log-sum-exp -inf counts nothing."""
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a, weight_b = (a.lse - lse).exp().unsqueeze(-1), (b.lse - lse).exp().unsqueeze(-1)
    return Partial(a.output * weight_a + b.output * weight_b, lse)


def by_kv_head(sinks: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A model's sinks [heads] as kernels take them: float32 [H, G]."""
    return sinks.float().unflatten(0, (kv_heads, -1)).contiguous()


def add_sinks(part: Partial, sinks: torch.Tensor) -> Partial:
    """A part to whose softmax each query head has one more logit, without a value: learned attention sinks, [H, G]."""
    lse = torch.logaddexp(part.lse, sinks)
    return Partial(part.output * (part.lse - lse).exp().unsqueeze(-1), lse)


def note_mass(mass: torch.Tensor, exact_lse: torch.Tensor, whole_lse: torch.Tensor) -> None:
    """Add the recalled mass of one layer of one step to the layer's accumulator.

    The recalled mass of a (request, kv head, query head) is the share of its attention that was read exactly, namely of
    sinks (learned ones too), gaps, window and recalled tokens: exp(exact_lse - whole_lse), at most 1. It is an estimate,
    because the rest of the whole is one: the clusters' estimate of what was not recalled, or, where that is switched off,
    score's `total`, which estimates all clusters. What is not a number counts as 0: one broken request must not hide all
    others.

    Nothing here waits for the device.

    Args:
        mass: float64 [2], sum of shares and how many, on the device of the others.
        exact_lse: float32 [B, H, G], log-sum-exp of the tokens that were read.
        whole_lse: float32 [B, H, G], log-sum-exp of all tokens.
    """
    share = (exact_lse - whole_lse).exp().clamp(max=1.0).nan_to_num(0.0)
    mass[0].add_(share.sum(dtype=mass.dtype))
    mass[1].add_(share.numel())
