"""Attend and the estimate in one launch: neither reads what the other writes.

A launch less; and where a batch is small, programs of one kind fill the SMs that those of the other leave idle. A request's
programs divide its work by what its lists really hold, so that a captured launch fits short and long requests alike; of one
that is dense all attend. The longest programs have the lowest numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.attend import triton as attend_triton
from sglang_clusterkv.kernels.attend.triton import attend_part
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.estimate import triton as estimate_triton
from sglang_clusterkv.kernels.estimate.triton import estimate_program
from sglang_clusterkv.kernels.triton_fp8 import POINTERS, as_argument
from sglang_clusterkv.kernels.triton_rows import layer_arrays, register_limit, row_arguments
from sglang_clusterkv.kernels.triton_tier import OFF
from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.codec import CODE_LOSS, RowCodec

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

STAGES = 2
# Where ptxas would spill some rather than take more; values that move need more than let a third program fit an SM.
REGISTERS = {80: 255, 90: 168, 100: 255}
MOVING_REGISTERS = dict.fromkeys(REGISTERS, 255)
_OFF = tl.constexpr(OFF.value)

# What differs from step to step must not make a variant of the kernel: it would be compiled while serving.
CHANGING = ("base_stride", "pages_stride", "segment_begin_stride")

_ATTEND, _ATTEND_TILE = (tl.constexpr(work) for work in grids.ATTEND_WORK)
_OWN, _OWN_TILE = (tl.constexpr(work) for work in grids.OWN_PART_WORK)
_REST, _REST_TILE = (tl.constexpr(work) for work in grids.REST_WORK)
_MOVING, _MOVING_TILE = (tl.constexpr(work) for work in grids.MOVING_WORK)


@triton.jit
def division(programs, base, recalled, clusters, limit, MOVES: tl.constexpr):
    """(attend's splits, the estimate's programs of own mean values) of so many programs: `grids.divided`."""
    attend = _ATTEND + _ATTEND_TILE * (tl.cdiv(base, 64) + tl.cdiv(recalled, 64))
    own = _OWN + _OWN_TILE * tl.cdiv(tl.minimum(clusters, limit), 32)
    if MOVES:
        has_rest = True
        rest = _MOVING + _MOVING_TILE * tl.cdiv(clusters, 256)
    else:
        has_rest = clusters > limit
        rest = tl.where(has_rest, _REST + _REST_TILE * tl.cdiv(clusters, 256), 0)
    whole = attend + own + rest
    splits = tl.maximum(1, tl.minimum((programs * attend + whole // 2) // whole, programs - 2))
    owned = tl.maximum(1, tl.minimum((programs * own + whole // 2) // whole, programs - 1 - splits))
    return splits, tl.where(has_rest, owned, programs - splits)


@triton.jit(do_not_specialize=CHANGING)
def parts_kernel(
    q, keys, values, base_slots, base_count, base_logit, recalled, recalled_count, pages, page_count, dense_count,
    exact_count, exact_output, exact_lse, factors, rows, row_scales, vectors, segment_of_page, segment_begin, offset, dot,
    segment_bonus, spread, left, mass, own, edge, rest_output, rest_lse, scale, limit, moving, estimate_spread, code_loss,
    q_stride, base_stride, logit_stride, recalled_stride, pages_stride, segment_begin_stride, clusters_stride, segments_stride,
    own_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, SHARE: tl.constexpr, PAGE: tl.constexpr, DOT: tl.constexpr,
    OWN_GROUP: tl.constexpr, EIGHTH_PAD: tl.constexpr, QUARTER_PAD: tl.constexpr, FORMAT: tl.constexpr,
    PER_SCALE: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_REST: tl.constexpr,
    SEGMENTS: tl.constexpr, LIMITED: tl.constexpr, MOVES: tl.constexpr, OWN_DOT: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, P): `estimate_program` and `attend_part`, each with room for P parts.

    exact_count: int32 [B, H], how many of the P attend; the others estimate. GROUP_PAD, DOT: attend's; OWN_GROUP, OWN_DOT: the
    estimate's.
    """
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    programs = tl.num_programs(1)
    b = pair // HEADS
    clusters = tl.load(page_count + b).to(tl.int32) * PER_PAGE
    base = tl.load(base_count + b).to(tl.int32)
    splits, own_parts = division(programs, base, tl.load(recalled_count + pair), clusters, limit, MOVES)
    splits = tl.where(clusters > 0, splits, programs)
    parts = programs - splits
    if part < parts:
        rest_parts = parts - own_parts
        estimate_program(
            pair, tl.where(part < rest_parts, own_parts + part, part - rest_parts),
            q if MOVES else None, factors, rows, row_scales, vectors, pages, segment_of_page, segment_begin, page_count, offset,
            dot, segment_bonus, spread, left, mass, own, edge, rest_output, rest_lse, own_parts, rest_parts, programs, limit,
            moving, estimate_spread, code_loss, q_stride, pages_stride, segment_begin_stride, clusters_stride, segments_stride,
            own_stride, HEADS, GROUP, OWN_GROUP, CHANNELS, EIGHTH_PAD, QUARTER_PAD, FORMAT, PER_SCALE, PER_PAGE, BLOCK_OWN,
            BLOCK_REST, SEGMENTS, LIMITED, MOVES, OWN_DOT,
        )  # fmt: skip
    else:
        if part == parts:
            tl.store(exact_count + pair, splits)
        attend_part(
            pair, part - parts, splits, programs, q, keys, values, None, None, None, None, base_slots, base_count,
            base_logit, recalled, recalled_count, pages, page_count, dense_count, exact_output, exact_lse, scale, 0.0, 1 << 30,
            q_stride, base_stride, logit_stride, recalled_stride, pages_stride,
            HEADS, GROUP, GROUP_PAD, CHANNELS, BLOCK_D, BLOCK_N, SHARE, True, False, PAGE, _OFF, DOT,
        )  # fmt: skip


def _constants(
    codec: RowCodec,
    per_page: int,
    limit: int,
    heads: int,
    group: int,
    clusters: int,
    dtype: torch.dtype,
    page_size: int,
    moving: bool,
) -> dict[str, Any]:
    """The kernel's constants, by argument name; see `estimate_constants`."""
    attended = attend_triton.tile_constants(heads, group, codec.head_dim, dtype)
    estimated = estimate_triton.estimate_constants(codec, per_page, limit, heads, group, clusters, dtype, moving)
    return {
        **estimated,
        **attended,
        "OWN_GROUP": estimated["GROUP_PAD"],
        "OWN_DOT": estimated["DOT"],
        "SHARE": max(1, grids.TOKENS_PER_SPLIT // attended["BLOCK_N"]),
        "PAGE": page_size,
    }


def attend_and_estimate(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    w: Workspace,
    programs: int,
) -> None:
    """What `attend` and `estimate` write, `programs` parts of each (request, kv head), and how many of these are exact.

    Arguments as theirs; there is no host tier.
    """
    arrays, shape, config = layer_arrays(index, layer), w.shape, index.config
    clusters = estimate_triton.listed_clusters(index, step)
    constants = _constants(
        index.row_codec, index.clusters_per_page, config.estimate_clusters, shape.heads, shape.group, clusters, q.dtype,
        index.geometry.page_size, movement.moves(config),
    )  # fmt: skip
    parts_kernel[(step.batch * shape.heads, programs)](
        q, as_argument(keys), as_argument(values), step.base_slots, step.base_count, w.base_logit, w.recalled,
        w.recalled_count, step.pages, step.page_count, step.dense_count, w.exact_count, w.exact_output, w.exact_lse,
        arrays.factors if constants["MOVES"] else None, arrays.value_rows, arrays.value_scales, arrays.vectors,
        step.segment_of_page, step.segment_begin, w.offset, w.dot, w.segment_bonus, w.spread, w.left, w.estimate_mass, w.own,
        w.own_edge, w.rest_output, w.rest_lse, scale, config.estimate_clusters, scale * movement.weight(config),
        config.estimate_spread, CODE_LOSS[config.code_bits], q.stride(0), step.base_slots.stride(0), shape.base, shape.budget,
        step.pages.stride(0), step.segment_begin.stride(0), shape.clusters, shape.segments, w.own.shape[2], **constants,
        num_stages=STAGES, **register_limit(MOVING_REGISTERS if constants["MOVES"] else REGISTERS),
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("q", "keys", "values", "vectors", "spread"), "*bf16"),
    "factors": "*i32",
    **dict.fromkeys(("base_slots", "base_count", "recalled", "pages", "page_count", "dense_count"), "*i64"),
    **dict.fromkeys(("segment_of_page", "segment_begin"), "*i64"),
    **dict.fromkeys(("recalled_count", "exact_count", "left", "own", "edge", "offset"), "*i32"),
    **dict.fromkeys(("base_logit", "exact_output", "exact_lse", "rest_output", "rest_lse"), "*fp32"),
    **dict.fromkeys(("dot", "segment_bonus", "mass"), "*fp32"),
    **dict.fromkeys(("scale", "moving", "estimate_spread", "code_loss"), "fp32"),
    **dict.fromkeys(("limit", "q_stride", "base_stride", "logit_stride"), "i32"),
    **dict.fromkeys(("recalled_stride", "pages_stride", "segment_begin_stride", "clusters_stride"), "i32"),
    **dict.fromkeys(("segments_stride", "own_stride"), "i32"),
}
_ALIGNED = ("q_stride", "logit_stride", "recalled_stride", "clusters_stride", "segments_stride")


def _case(
    codec: RowCodec, clusters: int, group: int = 4, pool: str = "bf16", moving: bool = False, **holds: Any
) -> CompileCase:
    """A case of 2 clusters per page and 512 of their own mean value; pool: as for attend."""
    row_types, absent = row_arguments(codec)
    absent |= {} if moving else {"factors": None}
    types = _TYPES | row_types | dict.fromkeys(("keys", "values"), POINTERS.get(pool, "*bf16"))
    types = {name: kind for name, kind in types.items() if name not in absent}
    constants = _constants(codec, 2, 512, 8, group, clusters, torch.bfloat16, 16, moving)
    return CompileCase(
        f"attend and estimate {codec.name} D={codec.head_dim} G={group} C={clusters:,}"
        + ("" if pool == "bf16" else f" {pool}")
        + " moving" * moving,
        parts_kernel,
        types,
        constants | absent | {"DOT": tl.bfloat16, "OWN_DOT": tl.bfloat16},
        tuple(name for name, kind in types.items() if kind[0] == "*" or name in _ALIGNED),
        num_stages=STAGES,
        register_limits=MOVING_REGISTERS if moving else REGISTERS,
        **holds,
    )


COMPILE_CASES = [
    _case(RowCodec("int4", 128), 512, tensor_cores=24, async_loads_128=8, programs_per_sm=2),
    _case(RowCodec("int4", 64), 4096, group=3, tensor_cores=24, async_loads_128=8, programs_per_sm=3),
    _case(RowCodec("int4", 128), 4096, tensor_cores=32, async_loads_128=8, programs_per_sm=2),
    _case(RowCodec("int4", 128), 4096, group=8, tensor_cores=32, async_loads_128=8, programs_per_sm=2),
    _case(RowCodec("int4", 256), 4096, tensor_cores=32, async_loads_128=8, programs_per_sm=2),
    _case(RowCodec("bf16", 128), 4096, tensor_cores=32, async_loads_128=8, programs_per_sm=2),
    _case(RowCodec("int4", 128), 4096, pool="e4m3", tensor_cores=32, async_loads_128=8, programs_per_sm=2),
    *(
        _case(RowCodec("int4", channels), clusters, group, moving=True, tensor_cores=32, programs_per_sm=2)
        for channels, clusters, group in ((128, 512, 4), (64, 4096, 3), (128, 4096, 4), (256, 4096, 4))
    ),
]
