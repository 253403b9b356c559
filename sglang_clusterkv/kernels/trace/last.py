"""What a layer of a step read for one of its requests, for whoever looks on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LastRead(NamedTuple):
    """What `sparse_decode` read for one request, as the chain left it: void once it runs again. R is the room for slots."""

    recalled: torch.Tensor  # int64 [H, R], slots, by cluster, then by position; garbage beyond the count
    count: torch.Tensor  # int32 [H]
    # float32 [H, G, W], logits of the always-attended tokens and a learned sink; -inf beyond these
    base_logit: torch.Tensor
    exact_lse: torch.Tensor  # float32 [H, G], log-sum-exp of these and the recalled tokens
    whole_lse: torch.Tensor  # float32 [H, G], of all tokens, as far as the step knows
