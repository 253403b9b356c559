"""Merge: two partial attentions by their log-sum-exps."""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels.attend.reference import Partial


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over both parts. A part with log-sum-exp -inf counts nothing."""
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a, weight_b = (a.lse - lse).exp().unsqueeze(-1), (b.lse - lse).exp().unsqueeze(-1)
    return Partial(a.output * weight_a + b.output * weight_b, lse)
