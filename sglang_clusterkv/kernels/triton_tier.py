"""Keys and values of either tier in Triton kernels; memory/host.py is the definition of the host's rows.

Kernels take slots as SGLang counts them, logical ones, and look up where a token's page is: one number from the device. Where
TIER is OFF nothing of this is compiled. Rows on the host are read over the bus where they lie, in page-locked memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.triton_fp8 import as_argument, widened

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import TierLayer

OFF = tl.constexpr(0)  # every page is on the device
SAME = tl.constexpr(1)  # host rows have the pool's dtype
ROUNDED = tl.constexpr(2)  # they are int8


@triton.jit
def find_slots(device_page, slots, listed, HEADS: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr):
    """Where tokens at logical slots int64 [N] are: (slot of the buffers, line of the host of kv head 0, whether it is there).

    listed: of slots that are not, all three mean nothing. Where TIER is OFF the first is the slot itself, the others are
    unused.
    """
    if TIER == OFF:
        at, line, away = slots, slots, listed
    else:
        page = (slots.to(tl.uint32) // PAGE).to(tl.int64)  # slots are below 2^31: SGLang keeps them in 32 bits
        offset = slots - page * PAGE
        device = tl.load(device_page + page, mask=listed, other=0)
        at, line, away = device * PAGE + offset, page * (HEADS * PAGE) + offset, device == 0
    return at, line, away


@triton.jit
def load_rows(
    rows, host, host_scales, at, line, away, listed, h, d, PART: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    PAGE: tl.constexpr, TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows of kv head h as a tile in `DOT`, int8 ones rounded as they would be on the device; 0 where a token is not listed.

    rows: [slots, HEADS, CHANNELS], the layer's keys (PART 0) or values (1); at, line, away: what `find_slots` gave, in the
    shape of `listed`, [N, 1] or [1, N]; d: channels, [1, D] or [D, 1].
    """
    mask = listed & (d < CHANNELS)
    if TIER == OFF:
        tile = tl.load(rows + (at * HEADS + h) * CHANNELS + d, mask=mask, other=0.0)
        tile = widened(tile, DOT)
    elif TIER == SAME:
        stored = host + (line + h * PAGE) * (2 * CHANNELS) + PART * CHANNELS
        source = tl.where(away, stored, rows + (at * HEADS + h) * CHANNELS)
        # Rows of 32 bytes or more in either tier, which the choice between two pointers hides: loads of 16 bytes.
        tile = widened(tl.load(tl.multiple_of(source, [16, 16]) + d, mask=mask, other=0.0), DOT)
    else:
        WORDS: tl.constexpr = CHANNELS // 2 + 2  # of a host row, 4 bytes each
        row = line + h * PAGE
        here = tl.load(rows + (at * HEADS + h) * CHANNELS + d, mask=mask & (away == 0), other=0.0)
        levels = tl.load(host + row * (4 * WORDS) + PART * CHANNELS + d, mask=mask & away, other=0)
        scale = tl.load(host_scales + row * WORDS + CHANNELS // 2 + PART, mask=listed & away, other=0.0)
        tile = tl.where(away, (levels.to(tl.float32) * scale).to(DOT), here.to(DOT))
    return tile


def tier_arguments(tier: TierLayer | None) -> tuple[torch.Tensor | None, ...]:
    """A kernel's arguments device_page, host, host_scales and reads; None where there is no tier."""
    if tier is None:
        return None, None, None, None
    tensors = tier.tensors
    return tensors.device_page, as_argument(tensors.rows), tensors.scales, tensors.reads


def tier_constants(tier: TierLayer | None) -> dict[str, int]:
    """Its constants."""
    if tier is None:
        return {"TIER": OFF.value, "PAGE": 1}
    return {"TIER": (SAME if tier.tensors.scales is None else ROUNDED).value, "PAGE": tier.tensors.page_size}


def tier_case(form: int, pool: str = "*bf16") -> tuple[dict[str, str], dict[str, Any]]:
    """The same in compile cases, at 16 tokens per page: types of arguments, and constants with the arguments that are None.

    Args:
        form: a value of TIER.
        pool: type of a pointer to keys.
    """
    types = {"device_page": "*i64", "host": "*i8" if form == ROUNDED.value else pool, "reads": "*i64"}
    if form == ROUNDED.value:
        types["host_scales"] = "*fp32"
    if form == OFF.value:
        types = {}
    missing = {name for name in ("device_page", "host", "host_scales", "reads") if name not in types}
    return types, {**dict.fromkeys(missing), "TIER": form, "PAGE": 1 if form == OFF.value else 16}
