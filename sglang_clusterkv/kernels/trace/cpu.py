"""What a layer read of one request, on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import bits, fast_exp, njit
from sglang_clusterkv.kernels.row_cpu import KEYS, POOL_FORMATS, pool_kernels
from sglang_clusterkv.kernels.threads_cpu import cached
from sglang_clusterkv.kernels.trace.reference import LEVELS_PER_OCTAVE, NOWHERE, Shares
from sglang_clusterkv.kernels.vectors_cpu import TOGETHER

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.decode.last import LastRead
    from sglang_clusterkv.memory.tier import TierLayer

    def dots(*args: Any) -> int: ...  # what `cached` gives the kernel


@functools.cache
def shares_kernel(channels: int, group: int, pool: int) -> Callable[..., None]:
    """Compile `reference.shares` for one head_dim, group size and pool format; outputs: slots, share and mass."""
    pool_dots, _ = pool_kernels(channels, group, pool)

    def shares_of(
        q: Any, keys: Any, host: Any, recalled: Any, count: Any, base_logit: Any, exact_lse: Any, whole_lse: Any,
        scale: Any, slots: Any, share: Any, mass: Any,
    ) -> None:  # fmt: skip
        one, each = np.float32(1.0), np.float32(1.0 / group)
        listed = np.zeros(recalled.shape[1] + TOGETHER, np.int64)
        logits = np.empty((group, recalled.shape[1] + TOGETHER), np.float32)
        for h in range(q.shape[0]):
            for t in range(count[h]):
                slots[h, t] = recalled[h, t]
                listed[t] = recalled[h, t]
            for t in range(TOGETHER):
                listed[count[h] + t] = recalled[h, 0]
            dots(keys, host, KEYS, listed, 0, count[h], h, q[h], logits)
            for t in range(count[h]):
                total = np.float32(0.0)
                for g in range(group):
                    total += min(one, fast_exp(logits[g, t] * scale - whole_lse[h, g]))
                share[h, t] = total * each
            for g in range(group):
                exact = min(one, np.exp(exact_lse[h, g] - whole_lse[h, g]))
                base = np.float32(0.0)
                for t in range(base_logit.shape[2]):
                    base += fast_exp(base_logit[h, g, t] - whole_lse[h, g])
                base = min(base, exact)
                if exact == exact and base == base:  # what is not a number counts as 0
                    mass[h, 0] += base * each
                    mass[h, 1] += (exact - base) * each
                    mass[h, 2] += (one - exact) * each

    return cached(shares_of, (channels, group, pool), dots=pool_dots)


def shares(read: LastRead, q: torch.Tensor, keys: torch.Tensor, scale: float, tier: TierLayer | None = None) -> Shares:
    """See `reference.shares`."""
    heads, group, channels = q.shape
    slots = np.zeros(read.recalled.shape, np.int64)
    share = np.zeros(read.recalled.shape, np.float32)
    mass = np.zeros((heads, 3), np.float32)
    count = read.count.numpy()
    kernel = shares_kernel(channels, group, POOL_FORMATS[keys.dtype])
    kernel(
        q.float().contiguous().numpy(), bits(keys), None if tier is None else tier.arrays, read.recalled.numpy(), count,
        read.base_logit.numpy(), read.exact_lse.numpy(), read.whole_lse.numpy(), np.float32(scale), slots, share, mass,
    )  # fmt: skip
    return Shares(
        torch.from_numpy(slots), torch.from_numpy(count.copy()), torch.from_numpy(share), torch.from_numpy(mass)
    )


@njit(cache=True, nogil=True)
def placed_kernel(
    slots: Any, count: Any, share: Any, begin_of_page: Any, context: int, page_size: int, position: Any, level: Any
) -> None:
    """As `reference.placed`; begin_of_page is indexed by page, and no position is `context` or more."""
    listed = np.full(context, -1, np.int32)  # by position, its place among the recalled
    for layer in range(slots.shape[0]):
        for h in range(slots.shape[1]):
            for t in range(count[layer, h]):
                page = slots[layer, h, t] // page_size
                listed[begin_of_page[page] + slots[layer, h, t] - page * page_size] = t
            found = 0
            for p in range(context):
                t = listed[p]
                if t >= 0:
                    listed[p] = -1
                    position[layer, h, found] = p
                    value = np.rint(255 + LEVELS_PER_OCTAVE * np.log2(share[layer, h, t]))
                    level[layer, h, found] = np.uint8(min(max(value, 0.0), 255.0)) if value == value else np.uint8(0)
                    found += 1


def placed(
    slots: torch.Tensor, count: torch.Tensor, share: torch.Tensor, pages: torch.Tensor, positions: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `reference.placed`."""
    begin_of_page = np.empty(int(pages[-1]) + 1, np.int64)
    begin_of_page[pages.numpy()] = positions.numpy()
    position = torch.full(slots.shape, NOWHERE, dtype=torch.int32)
    level = torch.zeros(slots.shape, dtype=torch.uint8)
    placed_kernel(
        slots.numpy(), count.numpy(), share.numpy(), begin_of_page, int(positions.max()) + page_size, page_size,
        position.numpy(), level.numpy(),
    )  # fmt: skip
    return position, level
