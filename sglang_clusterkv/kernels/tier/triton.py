"""Moves between the tiers on a GPU: two kernels, one launch each for all layers and kv heads.

Host rows lie in page-locked memory, which programs read and write over the bus. What need not be moved is masked, so that
nothing depends on how much that is, and the host never asks. Offsets are those of `kmeans.triton.segments.Pool`.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.encode.triton.rows import round_even
from sglang_clusterkv.kernels.kmeans.triton.segments import Pool, pool_of
from sglang_clusterkv.kernels.triton_fp8 import as_argument
from sglang_clusterkv.kernels.triton_tier import ROUNDED, SAME, find_slots, load_rows, tier_case, tier_constants
from sglang_clusterkv.memory.host import LEVELS

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import Tier

_LEVELS = tl.constexpr(LEVELS)
_TOKENS = 32  # per program, of one layer and kv head
# These differ from call to call: no variant for 1 and multiples of 16.
_COUNTS = ("tokens", "first_layer", "kind", "out_stride", "system_pages")
_LISTS = ("pages", "device_pages", "slots", "places")


@triton.jit
def _encode(x, rows, scales, row, live, d, PART: tl.constexpr, CHANNELS: tl.constexpr):
    """Write rows [TOKENS, D] as int8 with their scales; `HostRows.encode` is the definition."""
    WORDS: tl.constexpr = CHANNELS // 2 + 2
    wide = x.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(wide), 1), _LEVELS)
    levels = round_even(tl.div_rn(wide, tl.where(scale > 0, scale, 1.0)[:, None]))
    levels = tl.minimum(tl.maximum(levels, -_LEVELS), _LEVELS).to(tl.int32).to(tl.int8)
    at = rows + row[:, None] * (4 * WORDS) + PART * CHANNELS + d[None, :]
    tl.store(at, levels, mask=live[:, None] & (d < CHANNELS)[None, :])
    tl.store(scales + row * WORDS + CHANNELS // 2 + PART, scale, mask=live)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_LISTS)
def store_kernel(
    keys, values, key_offsets, value_offsets, host, host_scales, pages, device_pages,
    tokens, system_pages,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr,
    SYSTEM_PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, kv heads, layers): rows of listed pages, one page after the other, to the host.

    pages: int64 [n], 0: left out; device_pages: int64 [n]; tokens: n * PAGE; system_pages: of SYSTEM_PAGE bytes, from layer
    to layer of the host's rows.
    """
    h, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    listed = t < tokens
    page = tl.load(pages + t // PAGE, mask=listed, other=0)
    device = tl.load(device_pages + t // PAGE, mask=listed, other=0)
    live = page > 0
    offset = t % PAGE
    source = ((device * PAGE + offset) * HEADS + h)[:, None] * CHANNELS + d[None, :]
    row = (page * HEADS + h) * PAGE + offset
    mask = live[:, None] & (d < CHANNELS)[None, :]
    keys += tl.multiple_of(tl.load(key_offsets + layer), 8)
    values += tl.multiple_of(tl.load(value_offsets + layer), 8)
    host += layer * system_pages * (SYSTEM_PAGE // (host.dtype.element_ty.primitive_bitwidth // 8))
    if TIER == SAME:
        target = host + row[:, None] * (2 * CHANNELS) + d[None, :]
        tl.store(target, tl.load(keys + source, mask=mask, other=0.0), mask=mask)
        tl.store(target + CHANNELS, tl.load(values + source, mask=mask, other=0.0), mask=mask)
    else:
        host_scales += layer * system_pages * (SYSTEM_PAGE // 4)
        _encode(tl.load(keys + source, mask=mask, other=0.0), host, host_scales, row, live, d, 0, CHANNELS)
        _encode(tl.load(values + source, mask=mask, other=0.0), host, host_scales, row, live, d, 1, CHANNELS)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_LISTS)
def load_kernel(
    keys, values, key_offsets, value_offsets, device_page, host, host_scales, reads, slots, places,
    out_keys, out_values, out_key_offsets, out_value_offsets,
    tokens, first_layer, kind, out_stride, system_pages,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr,
    SYSTEM_PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, kv heads, layers): rows of listed tokens from either tier, to the same layer of the output.

    slots: int64 [tokens], logical. device_page: None: all of them are read from the host. places: int64 [tokens], each one's
    row of the output, below PAGE (padding): it is left out; None: its place in the list. out_*_offsets: as the pool's; None:
    layers are `out_stride` elements apart, which is a multiple of 8. reads, kind: counts what was read from the host; None:
    it is not counted.
    """
    h, i = tl.program_id(1), tl.program_id(2)
    layer = (first_layer + i).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    live = t < tokens
    slot = tl.load(slots + t, mask=live, other=0)
    if places is None:
        place = t.to(tl.int64)
    else:
        place = tl.load(places + t, mask=live, other=0)
        live = place >= PAGE
    if device_page is None:
        page = (slot.to(tl.uint32) // PAGE).to(tl.int64)
        at, line, away = slot, page * (HEADS * PAGE) + slot - page * PAGE, live
    else:
        at, line, away = find_slots(device_page, slot, live, HEADS, PAGE, TIER)
    keys += tl.multiple_of(tl.load(key_offsets + layer), 8)
    values += tl.multiple_of(tl.load(value_offsets + layer), 8)
    host += layer * system_pages * (SYSTEM_PAGE // (host.dtype.element_ty.primitive_bitwidth // 8))
    if TIER == ROUNDED:
        host_scales += layer * system_pages * (SYSTEM_PAGE // 4)
    if out_key_offsets is None:
        out_keys += tl.multiple_of(i.to(tl.int64) * out_stride, 8)
        out_values += tl.multiple_of(i.to(tl.int64) * out_stride, 8)
    else:
        out_keys += tl.multiple_of(tl.load(out_key_offsets + layer), 8)
        out_values += tl.multiple_of(tl.load(out_value_offsets + layer), 8)
    target = (place * HEADS + h)[:, None] * CHANNELS + d[None, :]
    mask = live[:, None] & (d < CHANNELS)[None, :]
    key = load_rows(
        keys, host, host_scales, at[:, None], line[:, None], away[:, None], live[:, None], h, d[None, :], 0, HEADS, CHANNELS,
        PAGE, TIER, keys.dtype.element_ty,
    )  # fmt: skip
    tl.store(out_keys + target, key, mask=mask)
    value = load_rows(
        values, host, host_scales, at[:, None], line[:, None], away[:, None], live[:, None], h, d[None, :], 1, HEADS, CHANNELS,
        PAGE, TIER, keys.dtype.element_ty,
    )  # fmt: skip
    tl.store(out_values + target, value, mask=mask)
    if reads is not None:
        tl.atomic_add(reads + kind, tl.sum((live & away).to(tl.int32)).to(tl.int64))


class _Arguments(NamedTuple):
    """What launches over a tier share; made once."""

    keys: Pool
    values: Pool
    host: torch.Tensor  # of the first layer
    host_scales: torch.Tensor | None
    system_pages: int  # from layer to layer of both
    constants: dict[str, Any]

    @property
    def pools(self) -> tuple[torch.Tensor, ...]:
        """A kernel's arguments by which it finds the pool's rows."""
        return self.keys.first, self.values.first, self.keys.layer_offsets, self.values.layer_offsets


def _arguments(tier: Tier) -> _Arguments:
    if "triton" not in tier.scratch:
        assert all(buffer.is_contiguous() for buffer in (*tier.keys, *tier.values)), "a host tier's buffers have gaps"
        first = tier.layer(0)
        host, scales = as_argument(first.tensors.rows), first.tensors.scales
        heads, channels = tier.keys[0].shape[1:]
        tier.scratch["triton"] = _Arguments(
            pool_of(tier.keys),
            pool_of(tier.values),
            host,
            scales,
            tier.host.layer_bytes // mmap.PAGESIZE,
            _constants(heads, channels) | tier_constants(first),
        )
    return tier.scratch["triton"]


def _constants(heads: int, channels: int) -> dict[str, int]:
    return {
        "HEADS": heads,
        "CHANNELS": channels,
        "BLOCK_D": triton.next_power_of_2(channels),
        "SYSTEM_PAGE": mmap.PAGESIZE,
        "TOKENS": _TOKENS,
    }


def store(tier: Tier, pages: torch.Tensor, device_pages: torch.Tensor) -> None:
    """See `kernels.tier.store`."""
    own, tokens = _arguments(tier), pages.numel() * tier.directory.page_size
    if tokens:
        store_kernel[triton.cdiv(tokens, _TOKENS), tier.host.kv_heads, len(tier.keys)](
            *own.pools, own.host, own.host_scales, pages, device_pages, tokens, own.system_pages, **own.constants
        )


def fetch(tier: Tier, pages: torch.Tensor, device_pages: torch.Tensor) -> None:
    """See `kernels.tier.fetch`."""
    own, page_size = _arguments(tier), tier.directory.page_size
    if not pages.numel():
        return
    inside = torch.arange(page_size, device=pages.device)
    slots, places = ((numbers.unsqueeze(1) * page_size + inside).flatten() for numbers in (pages, device_pages))
    _load(tier, 0, len(tier.keys), None, slots, places, own.pools, None, 0, 0)


def gather(
    tier: Tier, first_layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kind: int
) -> None:
    """See `kernels.tier.gather`."""
    assert keys[0].is_contiguous() and keys.stride() == values.stride(), "rows are written one after the other"
    if slots.numel():
        out = as_argument(keys), as_argument(values), None, None
        _load(
            tier, first_layer, len(keys), tier.directory.device_page, slots, None, out, tier.reads, kind, keys.stride(0)
        )


def _load(
    tier: Tier,
    first_layer: int,
    layers: int,
    device_page: torch.Tensor | None,
    slots: torch.Tensor,
    places: torch.Tensor | None,
    out: tuple[torch.Tensor | None, ...],
    reads: torch.Tensor | None,
    kind: int,
    out_stride: int,
) -> None:
    """Launch `load_kernel`, which says what its arguments are."""
    own, tokens = _arguments(tier), slots.numel()
    load_kernel[triton.cdiv(tokens, _TOKENS), tier.host.kv_heads, layers](
        *own.pools, device_page, own.host, own.host_scales, reads, slots, places, *out,
        tokens, first_layer, kind, out_stride, own.system_pages, **own.constants,
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("keys", "values", "out_keys", "out_values"), "*bf16"),
    **dict.fromkeys(("key_offsets", "value_offsets", "pages", "device_pages", "slots", "places"), "*i64"),
    **dict.fromkeys(("tokens", "first_layer", "kind", "out_stride", "system_pages"), "i32"),
}


def _case(name: str, kernel: Any, channels: int, tier: int, missing: tuple[str, ...] = (), **holds: Any) -> CompileCase:
    """A case of 8 kv heads in bf16; tier: a value of TIER; missing: arguments that are None."""
    tier_types, tier_values = tier_case(tier)
    types = {name: kind for name, kind in (_TYPES | tier_types).items() if name not in missing}
    values = _constants(8, channels) | {"SYSTEM_PAGE": 4096} | tier_values | dict.fromkeys(missing)
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    return CompileCase(
        f"{name} D={channels}" + (" int8" if tier == ROUNDED.value else ""),
        kernel,
        signature,
        {
            argument: value
            for argument, value in values.items()
            if argument in kernel.arg_names and argument not in types
        },
        tuple(argument for argument, kind in signature.items() if kind[0] == "*" and argument not in _LISTS),
        **holds,
    )


# `kmeans` and `encode` read what gather writes; a prefill does likewise.
_OFFSETS = ("out_key_offsets", "out_value_offsets")
_GATHERED = ("places", *_OFFSETS)
_FETCHED = ("device_page", "reads")
_TYPES |= dict.fromkeys(_OFFSETS, "*i64")
COMPILE_CASES = [
    *(
        _case(name, kernel, channels, tier, missing, loads_128=loads, programs_per_sm=2)
        for name, kernel, missing, loads in (
            ("tier store", store_kernel, (), 2),
            ("tier gather", load_kernel, _GATHERED, 2),
            ("tier fetch", load_kernel, _FETCHED, 0),
        )
        for tier in (SAME.value, ROUNDED.value)
        for channels in (128, 256)
    )
]
