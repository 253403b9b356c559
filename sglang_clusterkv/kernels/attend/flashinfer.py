"""Attend on a GPU by FlashInfer: each (request, kv head) is a request of its own, with a list of its own.

A pool [slots, H, D] is as well a paged cache of slots * H pages of one token and one head, so that token `slot` of kv head h is
page slot * H + h, and a batch's queries [B, H, G, D] are B * H requests of G query heads. Lists are made in place: what all
layers attend to once per step, behind it each layer's recalled tokens (`triton_index.py`). Their lengths are the same in all
layers and known on the host, so FlashInfer plans once per step, before any layer.

A captured step has a wrapper for its number of requests, made for graphs: what a run is launched with follows from that number
alone, and the rest it reads from memory that never moves, which the plan in front of a replay writes (docs/gpu.md has the
evidence). Padding has lists of one token.

FlashInfer reads the always-attended keys again, whose logits score has found already; and its log-sum-exps have base 2.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.attend.triton_index import lay_out, list_always
from sglang_clusterkv.memory.fp8 import FP8
from sglang_clusterkv.memory.step import to_device

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import ListShape, SparseStep

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)  # of FlashInfer's tensor-core kernels
WORKSPACE_BYTES = (
    64 << 20
)  # of its partial results without a graph: two programs for each SM of a GPU need a quarter of it
_MOST_PAGES = 2**31  # its indices have 32 bits
_PLANS = 2  # that may be on their way to the device: see `_plan`
_said: set[str] = set()  # why our own kernel attends instead; the warm-up asks as well


def why_not(config: ClusterKVConfig, heads: int, channels: int, dtype: torch.dtype, slots: int) -> str | None:
    """Why FlashInfer cannot attend, in words; None where it can, as far as can be known before its kernels are loaded.

    Args:
        config: the resolved configuration.
        heads: kv heads of this rank.
        channels: of a head.
        dtype: of the KV pool.
        slots: of the pool.
    """
    if not _installed():
        return "FlashInfer is not installed"
    if config.trace:
        return "traces are made from what our own kernels leave"
    if config.host_ratio > 1:
        return "it reads keys and values on the device only, and host_ratio is above 1"
    if dtype in FP8:
        return "it is planned here for queries and a KV cache of one type, and the cache is in fp8"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels for a KV cache in {str(dtype).removeprefix('torch.')}"
    if channels not in HEAD_DIMS:
        return f"it has kernels for heads of {', '.join(map(str, HEAD_DIMS))} channels, not of {channels}"
    if slots * heads >= _MOST_PAGES:
        return f"{slots:,} slots of {heads} kv heads are more than its indices of 32 bits can name"
    return None


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flashinfer") is not None
    except ValueError:  # it was put out of reach
        return False


class Buffers(NamedTuple):
    """What FlashInfer reads and writes beside the pool, for up to B requests of H kv heads, of G query heads each."""

    indptr: torch.Tensor  # int32 [B * H + 1], where each (request, kv head)'s list begins
    indices: torch.Tensor  # int32, the lists: rows of the pool
    last_page: torch.Tensor  # int32 [B * H], tokens of each list's last page: 1
    queries: torch.Tensor  # [B, H, G, D], those of all (request, kv head) equally far apart
    output: torch.Tensor  # [B, H, 1, G, D]
    lse: torch.Tensor  # float32 [B, H, 1, G], of base 2

    @property
    def bytes(self) -> int:
        """Bytes of all."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


class Run(NamedTuple):
    """One of FlashInfer's decodes."""

    wrapper: Any
    buffers: Buffers
    lists: SparseStep | None  # of captured steps of so many requests, padding included; None: of steps without a graph


class FlashInferAttend:
    """FlashInfer's decode over the lists of a step.

    `prepare` comes first, once per step. Captured steps: `reserve`, then `capture` for each number of requests, and `replay`
    before each replay.

    Args:
        heads: kv heads.
        group: query heads per kv head.
        channels: of a head.
        dtype: of queries and pool, bf16 or float16.
        device: of the pool.

    Raises whatever FlashInfer does where its kernels can neither be found nor compiled.
    """

    def __init__(self, heads: int, group: int, channels: int, dtype: torch.dtype, device: str) -> None:
        from flashinfer.decode import fast_decode_plan

        self._heads, self._group, self._channels, self._dtype, self._device = heads, group, channels, dtype, device
        self._on_gpu = torch.device(device).type == "cuda"
        self._plan_fast = fast_decode_plan
        self._graph_partial: torch.Tensor | None = None
        self._room: Buffers | None = None
        self._captured: dict[int, Run] = {}
        self._plan_memory: torch.Tensor | None = None  # on the device, of all wrappers
        self._staging: list[torch.Tensor] = []  # of plans, on the host: they take turns
        partial = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._any = self._run = Run(self._wrapper(partial), self._buffers(0, 0), None)
        self._plan_first(self._any.wrapper, self._buffers(1, 1), 1)

    def _wrapper(self, partial: torch.Tensor, **graph: Any) -> Any:
        """A wrapper, with partial results in `partial`; all share the memory of plans, of which one is in use at a time."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        # "auto" may choose cuDNN; tensor cores take any group, and lists shorter than planned.
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            partial, "NHD", use_tensor_cores=True, backend="fa2", use_cuda_graph=bool(graph), **graph
        )
        if self._plan_memory is None:
            self._plan_memory = wrapper._int_workspace_buffer
            staged = wrapper._pin_memory_int_workspace_buffer
            self._staging = [staged, *(torch.empty_like(staged, pin_memory=self._on_gpu) for _ in range(1, _PLANS))]
        wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer = self._plan_memory, self._staging[0]
        return wrapper

    def _plan_first(self, wrapper: Any, buffers: Buffers, pairs: int) -> None:
        """Have FlashInfer find or compile its kernels: a plan of lists of one token, after which it can be planned fast."""
        indptr = torch.arange(pairs + 1, dtype=torch.int32)
        last_page = torch.ones(pairs, dtype=torch.int32)
        wrapper.plan(
            indptr, buffers.indices[:pairs], last_page, self._group, 1, self._channels, 1,
            q_data_type=self._dtype, kv_data_type=self._dtype,
        )  # fmt: skip

    def _buffers(self, batch: int, listed: int) -> Buffers:
        """Room for so many requests and indices."""

        def make(*sizes: int, dtype: torch.dtype = torch.int32, fill: int = 0) -> torch.Tensor:
            return torch.full(sizes, fill, dtype=dtype, device=self._device)

        pairs, by_query = batch * self._heads, (batch, self._heads, 1, self._group)
        return Buffers(
            indptr=make(pairs + 1),
            indices=make(listed),
            last_page=make(pairs, fill=1),
            queries=make(batch, self._heads, self._group, self._channels, dtype=self._dtype),
            output=make(*by_query, self._channels, dtype=self._dtype),
            lse=make(*by_query, dtype=torch.float32),
        )

    @property
    def output(self) -> torch.Tensor:
        """What `attend` left: [B or more, H, 1, G, D]."""
        return self._run.buffers.output

    @property
    def lse(self) -> torch.Tensor:
        """Its log-sum-exps, in base 2: float32 [B or more, H, 1, G]."""
        return self._run.buffers.lse

    # -- captured steps -----------------------------------------------------------------------------------------------

    def reserve(self, room: ListShape, budget: int) -> int:
        """Make what captured steps read and write, which never moves; returns its bytes. What an earlier call made is given up.

        Args:
            room: of the lists of these steps.
            budget: tokens that a (request, kv head) recalls at most.

        Raises torch.OutOfMemoryError, and whatever FlashInfer does where it cannot plan for so many requests.
        """
        self._captured, self._room, self._graph_partial = {}, None, None
        pairs = room.batch * self._heads
        self._room = self._buffers(room.batch, self._heads * (room.listed + room.batch * (budget + 1)))
        size = graph_partial_bytes(pairs, self._group, self._channels, _sm_count(self._device))
        self._graph_partial = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._for_graph(room.batch)
        return self._room.bytes + size

    def _for_graph(self, batch: int) -> Any:
        """A wrapper for captured steps of so many requests, planned for the first time."""
        assert self._room is not None and self._graph_partial is not None, "reserve comes first"
        pairs = batch * self._heads
        wrapper = self._wrapper(
            self._graph_partial,
            paged_kv_indptr_buffer=self._room.indptr[: pairs + 1],
            paged_kv_indices_buffer=self._room.indices,
            paged_kv_last_page_len_buffer=self._room.last_page[:pairs],
        )
        self._plan_first(wrapper, self._room, pairs)
        return wrapper

    def capture(self, lists: SparseStep, page_size: int) -> None:
        """Before a step over these lists is captured: a plan for padding alone.

        Args:
            lists: as large as the step, all padding; later steps are written there.
            page_size: tokens per page.
        """
        assert self._room is not None, "reserve comes first"
        batch = lists.batch
        self._captured[batch] = Run(self._for_graph(batch), self._room, lists)
        list_always(lists, 1, page_size, self._room.indptr, self._room.indices, self._heads)

    def replay(self, batch: int) -> None:
        """Before a replay of the captured step of `batch` requests, padding included, over the step that was prepared."""
        if self._run is not self._captured[batch]:  # SGLang padded it further than it had to
            self._plan(self._captured[batch])

    # -- a step -------------------------------------------------------------------------------------------------------

    def prepare(self, step: SparseStep, budget: int, page_size: int) -> None:
        """Plan a step, and list what all of its layers attend to. Nothing waits for the device.

        Args:
            step: its lists. With `lengths`, for the least graph that holds it, if it is written where captured steps read, or
                for none; without, it is one that is captured.
            budget: tokens that a (request, kv head) recalls at most.
            page_size: tokens per page.
        """
        self._step, self._budget, self._page_size = step, budget, page_size
        if step.lengths is None:
            self._run = self._captured[step.batch]
            return
        least = min((batch for batch in self._captured if batch >= step.batch), default=None)
        run = self._any if least is None else self._captured[least]
        if run.lists is not None and run.lists.base_count.data_ptr() != step.base_count.data_ptr():
            run = self._any
        self._plan(run)

    def _plan(self, run: Run) -> None:
        """Plan the step for one of the decodes, by which its layers are run from now on."""
        step = self._step
        assert step.lengths is not None, "FlashInfer plans on the host"
        lists = step if run.lists is None else run.lists
        always, pairs = np.ones(lists.batch, np.int64), lists.batch * self._heads
        always[: step.batch] = np.maximum(step.lengths[:, 0], 1)
        listed = always.copy()
        listed[: step.batch] += np.minimum(step.lengths[:, 1], self._budget)
        indptr = np.zeros(pairs + 1, np.int32)
        np.cumsum(np.repeat(listed, self._heads), out=indptr[1:])
        if run.lists is None:
            run = self._any = Run(run.wrapper, self._large_enough(run.buffers, step.batch, int(indptr[-1])), None)
        buffers = run.buffers
        # The host is a step ahead: when it plans a step it has seen results of the one before the last, but not of the last,
        # whose copies may still wait. So the numbers of two plans, and of all begins, do not share memory.
        self._staging.append(self._staging.pop(0))
        run.wrapper._pin_memory_int_workspace_buffer = self._staging[0]
        begins = buffers.indptr[: pairs + 1]
        begins.copy_(to_device(indptr, torch.device(self._device).type, np.int32), non_blocking=True)
        self._plan_fast(
            run.wrapper, begins, buffers.indices, buffers.last_page[:pairs], self._group, 1, self._channels, 1,
            q_data_type=self._dtype, kv_data_type=self._dtype, global_override_indptr_cpu=torch.from_numpy(indptr),
        )  # fmt: skip
        list_always(lists, int(always.max()), self._page_size, begins, buffers.indices, self._heads)
        self._run = run

    def _large_enough(self, buffers: Buffers, batch: int, listed: int) -> Buffers:
        """These buffers, or new ones with room for so many requests and indices."""
        if len(buffers.lse) >= batch and len(buffers.indices) >= listed:
            return buffers
        return self._buffers(
            max(len(buffers.lse), _power_of_two(batch)), max(len(buffers.indices), _power_of_two(listed))
        )

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, w: Workspace) -> None:
        """One layer, into `output` [B, H, 1, G, D] and `lse` [B, H, 1, G], in base 2.

        Args:
            q: [B, H, G, D], those of a request side by side.
            keys: [slots, H, D], contiguous.
            values: likewise.
            scale: of the logits.
            w: as recall left it.
        """
        if self._run.lists is not None and self._step.lengths is not None:
            self._plan(self._any)  # no graph replays it after all
        wrapper, buffers, _ = self._run
        lay_out(self._step, w, q, buffers.indptr, buffers.indices, buffers.queries)
        pairs = q.shape[0] * self._heads
        paged = (-1, 1, 1, self._channels)
        wrapper._sm_scale = scale  # planned once for layers that may differ in it
        wrapper.run(
            buffers.queries.view(-1, self._group, self._channels)[:pairs],
            (keys.view(paged), values.view(paged)),
            out=buffers.output.view(-1, self._group, self._channels)[:pairs],
            lse=buffers.lse.view(-1, self._group)[:pairs],
            return_lse=True,
        )


def graph_partial_bytes(pairs: int, group: int, channels: int, sms: int) -> int:
    """Bytes of FlashInfer's partial results in a graph, whatever the lengths (PrefillPlanImpl in its scheduler.cuh).

    Args:
        pairs: (request, kv head).
        group: query heads per kv head.
        channels: of a head.
        sms: of the GPU.
    """
    tile = 16 if group <= 16 else 64 if group <= 64 or channels >= 256 else 128  # query heads of a program
    programs = max(2 * sms, -(-pairs * group // tile) + pairs - 1)
    rows = -(-programs * tile // group)
    return rows * group * (channels + 1) * 4 + 16


def _sm_count(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def engine_of(index: ClusterIndex, group: int, dtype: torch.dtype) -> FlashInferAttend | None:
    """FlashInfer for an index, if `attend_engine` asks for it; None where our own kernel attends, and why is said once.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        dtype: of the KV pool.
    """
    config, geometry = index.config, index.geometry
    if config.attend_engine != "flashinfer":  # auto: nothing was measured that would speak for another than ours
        return None
    heads, channels = geometry.kv_heads, geometry.head_dim
    why = why_not(config, heads, channels, dtype, geometry.slots)
    if why is None:
        try:
            return FlashInferAttend(heads, group, channels, dtype, index.device)
        except Exception as error:  # of a compiler, of a loader: whatever it is, our own kernel attends
            why = f"its kernels can neither be found nor compiled here ({type(error).__name__}: {error})"
    _say(why)
    return None


def reserved(engine: FlashInferAttend, room: ListShape, budget: int) -> tuple[FlashInferAttend | None, int]:
    """FlashInfer and the bytes of what captured steps need of it; None and 0 where it cannot serve them, which is said once.

    Args:
        engine: FlashInfer.
        room: of the lists of captured steps.
        budget: tokens that a (request, kv head) recalls at most.

    Raises torch.OutOfMemoryError.
    """
    try:
        return engine, engine.reserve(room, budget)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _say(f"it cannot be planned for decode graphs ({type(error).__name__}: {error})")
        return None, 0


def _say(why: str) -> None:
    if why not in _said:
        _said.add(why)
        logger.info("clusterkv: attend_engine is flashinfer, but our own kernel attends: %s", why)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
