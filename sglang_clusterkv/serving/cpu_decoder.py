"""Decoder layers of a decode step on our CPU platform: two compiled calls and attention in place of SGLang's modules.

In a step of a few tokens SGLang's modules, and what it has between them, take longer than most of their arithmetic. A layer
that is plain (plain_layers.py) is given a forward of ours, which runs it by `kernels/decoder_cpu.py` in a decode step, with
the same numbers to the bit. All else, and a step in which somebody looks at a module, goes to the layer's own forward.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels import fused_op
from sglang.srt.distributed import attention_tensor_model_parallel_all_reduce, tensor_model_parallel_all_reduce
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch.nn.modules import module as torch_modules

from sglang_clusterkv.kernels.decoder_cpu import (
    FEED,
    NEXT,
    PROJECT,
    STAGES,
    all_inside,
    before_kernel,
    behind_kernel,
    compile_decoder,
    step_numbers,
)
from sglang_clusterkv.kernels.products_cpu import SHARED
from sglang_clusterkv.kernels.threads_cpu import run
from sglang_clusterkv.serving.backend import ClusterKVAttnBackend
from sglang_clusterkv.serving.cpu_arrays import Arrays
from sglang_clusterkv.serving.cpu_layers import MOST_ROWS, MOST_TOKENS
from sglang_clusterkv.serving.plain_layers import Shape, is_plain, products_of, shape_of
from sglang_clusterkv.serving.platform import LAYERS
from sglang_clusterkv.serving.pool import ClusterKVPool

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def take_over(model: torch.nn.Module) -> int:
    """Give a model's plain decoder layers our forward, once their products are ours; returns how many."""
    if os.environ.get(LAYERS) == "0":
        return 0
    lists = [part for part in model.modules() if type(part) is torch.nn.ModuleList]
    found = list(dict.fromkeys(module for part in lists for module in part if is_plain(module)))
    alike = [module for module in found if shape_of(module) == shape_of(found[0]) and _is_float32(module)]
    if alike:
        compile_decoder()
        Stack(alike, lists)
    return len(alike)


def _is_float32(module: torch.nn.Module) -> bool:
    """Whether it is served in the type that the kernels take: in another each step would be looked at in vain."""
    return all(weight.dtype is torch.float32 for weight in module.parameters())


class Stack:
    """The layers of a model that run by our kernels.

    Args:
        modules: SGLang's, in their order; plain and alike.
        lists: of modules, that hold them.

    Attributes:
        shape: of each of them.
        count: of them.
        step: that they are in; None: they run by SGLang's modules.
    """

    def __init__(self, modules: list[torch.nn.Module], lists: list[torch.nn.ModuleList]) -> None:
        self.shape, self.count = shape_of(modules[0]), len(modules)
        self.step: Step | None = None
        self._modules = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self._hooks = [hooks for part in self._modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        holders = [part for part in (*self._modules, *lists) if part._modules]
        self._children = [(part._modules, list(part._modules.values())) for part in holders]
        self._values = [vars(part) for part in self._modules if part not in modules]
        self._methods = [(values, values["quant_method"]) for values in self._values if "quant_method" in values]
        self._forwards = [(kind, kind.forward, kind.__call__) for kind in {type(part) for part in self._modules}]
        self._scratch: dict[int, Scratch] = {}
        self._most = _most_tokens(self.shape)
        self.layers = [Layer(module, self, place) for place, module in enumerate(modules)]
        for layer, following in itertools.pairwise(self.layers):
            layer.precede(following)
        self._ours = []
        for module, layer in zip(modules, self.layers, strict=True):
            module.forward = layer.forward
            self._ours.append((vars(module), module.forward))

    def begin(self, positions: torch.Tensor, batch: ForwardBatch) -> None:
        """A forward comes to the first of the layers: whether they run by our kernels."""
        self.step = None
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not batch.forward_mode.is_decode():
            return
        tokens, slots, backend = batch.batch_size, batch.out_cache_loc, get_attn_backend()
        served = (
            0 < tokens <= self._most
            and type(backend) is ClusterKVAttnBackend
            and backend.prefill is None
            and _numbers(positions, tokens)
            and _numbers(slots, tokens)
            and self._is_untouched()
        )
        if not served:
            return
        pool = backend.token_to_kv_pool
        if not _plain_pool(pool) or not all(layer.arrays.are_there(pool) for layer in self.layers):
            return
        longest, room = map(
            min, zip(*((layer.arrays.longest, layer.arrays.room) for layer in self.layers), strict=True)
        )
        if not all_inside(positions.numpy(), longest) or not all_inside(slots.numpy(), room):
            return
        if tokens not in self._scratch:
            self._scratch[tokens] = Scratch(tokens, self.shape)
        self.step = Step(batch, backend, positions, self._scratch[tokens])

    def _is_untouched(self) -> bool:
        """Whether nobody replaced a module or its forward, watches one, or asks SGLang for another arithmetic."""
        return (
            not any(self._hooks)
            and all([*now.values()] == before for now, before in self._children)
            and not any("forward" in values for values in self._values)
            and all(values.get("forward") is ours for values, ours in self._ours)
            and all(kind.forward is forward and kind.__call__ is call for kind, forward, call in self._forwards)
            and all(values["quant_method"] is method for values, method in self._methods)
            and fused_op.get_fused_op_backend() is None
            and not fused_op._trace_enabled
        )


def _most_tokens(shape: Shape) -> int:
    """Of a step that runs by our kernels: those for which SGLang's modules would run by them, too, one by one."""
    if not shape.of_heads:
        return MOST_ROWS
    # A single head of several tokens is normed where it lies in their product, which is not contiguous.
    return 1 if min(shape.heads, shape.kv_heads) == 1 else min(MOST_ROWS, MOST_TOKENS // shape.heads)


def _numbers(x: torch.Tensor | None, count: int) -> bool:
    """Whether these are so many int64, one behind the other."""
    return x is not None and x.dtype is torch.int64 and x.shape == (count,) and x.is_contiguous()


def _plain_pool(pool: Any) -> bool:
    """Whether a row of a pool's buffer is a token's keys or values in float32, and nobody is asked before it is written."""
    return (
        type(pool) is ClusterKVPool
        and pool.dtype is torch.float32
        and pool.store_dtype is torch.float32
        and not pool.use_hnd
        and not pool.is_quantized_kv_cache
        and pool.kv_cache_layout != "vectorized_5d"
        and not pool.requires_physical_write_loc
        and pool.layer_transfer_counter is None
    )


class Scratch:
    """What the calls of a layer leave to each other, for so many tokens."""

    def __init__(self, tokens: int, shape: Shape) -> None:
        queries = shape.heads * shape.head_dim
        sizes = {
            "normed": shape.width,
            "projected": queries + 2 * shape.kv_heads * shape.head_dim,
            "by_head": queries,
            "queries": queries,
            "sum": shape.width,
            "output": shape.width,
            "gates": 2 * shape.inner,
            "gated": shape.inner,
        }
        self._kept = {name: torch.empty(tokens, size) for name, size in sizes.items()}
        self.addresses = {name: one.data_ptr() for name, one in self._kept.items()}
        self.queries, self.output = self._kept["queries"], self._kept["output"]


class Step:
    """A decode step of the layers.

    Attributes:
        batch: SGLang's, in which they are called.
        backend: that attends.
        tokens: of the batch.
        numbers: `decoder_cpu.STEP`.
        queries: float32 [tokens, heads * head_dim], what attention is asked.
        output: float32 [tokens, width], of attention's product.
        positions: int64 [tokens], of all layers.
        hidden: float32 [tokens, width], what a layer returns.
        residual: likewise, what is to be added to it.
        between: what `input` gives where a layer of ours was the last.
        pending: SGLang's note that it is; of the layer that ran last.
        ready: a layer of which all that is before attention was done with what the layer that ran last left.
    """

    def __init__(
        self, batch: ForwardBatch, backend: ClusterKVAttnBackend, positions: torch.Tensor, scratch: Scratch
    ) -> None:
        self.batch, self.backend, self.tokens = batch, backend, batch.batch_size
        self.positions, self.queries, self.output = positions, scratch.queries, scratch.output
        # Of the step alone: what the last layer leaves is SGLang's. Tensors made in inference mode do not tell of writes.
        with torch.inference_mode(False):
            self.hidden, self.residual = torch.empty(self.output.shape), torch.empty(self.output.shape)
        self.numbers = step_numbers(
            positions=positions.data_ptr(), slots=batch.out_cache_loc.data_ptr(), residual=self.residual.data_ptr(),
            hidden=self.hidden.data_ptr(), **scratch.addresses,
        )  # fmt: skip
        self.between = self.hidden.data_ptr(), self.residual.data_ptr(), scratch.addresses["sum"]
        self._kept = batch.out_cache_loc, scratch
        self._written: tuple[int, int] = (0, 0)
        self.pending: Any = None
        self.ready: Layer | None = None

    def input(self, hidden: Any) -> tuple[int, int, int] | None:
        """Addresses of a layer's input, of what is added to it (0: nothing), and of the sum; None: the layer is SGLang's.

        Where somebody wrote to what the last layer left, nothing is `ready` any more.
        """
        stream = self.batch.residual_stream
        if hidden is self.hidden and stream.pending is self.pending and stream.residual is self.residual:
            if self._written != (self.hidden._version, self.residual._version):
                self.ready = None
            return self.between
        pending = stream.pending
        if pending is not None and pending.update is not PLAIN_ADD:
            return None
        parts = (hidden,) if pending is None else (pending.value, stream.residual)
        if not all(isinstance(one, torch.Tensor) and self._fits(one) for one in parts):
            return None
        x, added = stream.export(hidden)  # complete over all ranks
        return (x.data_ptr(), 0, x.data_ptr()) if added is None else (x.data_ptr(), added.data_ptr(), self.between[2])

    def _fits(self, x: torch.Tensor) -> bool:
        return x.dtype is torch.float32 and x.shape == self.output.shape and x.is_contiguous()

    def leave(self) -> torch.Tensor:
        """Note that a layer's output and residual are there, as its last boundary would; returns the output."""
        stream = self.batch.residual_stream
        stream.write(self.residual)
        output = stream.record(self.hidden, PLAIN_ADD)
        self.pending, self._written = stream.pending, (self.hidden._version, self.residual._version)
        return output


class Layer:
    """A plain decoder layer.

    Args:
        module: SGLang's.
        stack: of all such layers of the model.
        place: among them.

    Attributes:
        arrays: that a step reads and writes.
    """

    def __init__(self, module: torch.nn.Module, stack: Stack, place: int) -> None:
        self._own, self._stack, self._first, self._last = module.forward, stack, place == 0, place == stack.count - 1
        self._attention = module.self_attn.attn
        self.arrays = Arrays(module, stack.shape)
        self._parallel = get_parallel().tp_size > 1
        sizes = [one.weight.numel() for one in products_of(module)]
        self._most = [None if size >= SHARED else 1 for size in (sizes[0], sizes[1], sum(sizes[2:]), sum(sizes[1:]))]
        self._next: Layer | None = None

    def precede(self, following: Layer) -> None:
        """The layer that SGLang calls next, if it is this one, is made ready by this one, unless ranks add up between."""
        if not self._parallel and following._attention.layer_id == self._attention.layer_id + 1:
            self._next = following

    def forward(
        self, positions: torch.Tensor, hidden_states: Any, forward_batch: ForwardBatch, *more: Any, **named: Any
    ) -> Any:
        """In place of the module's."""
        stack = self._stack
        if self._first:
            stack.begin(positions, forward_batch)
        step, given = stack.step, None
        if (
            step is not None
            and step.batch is forward_batch
            and step.positions is positions
            and not more
            and _nothing(named)
        ):
            given = step.input(hidden_states)
        if step is None or given is None:
            return self._own(positions, hidden_states, forward_batch, *more, **named)
        x_at, added_at, residual_at = given
        if step.ready is not self or given is not step.between:
            run(
                before_kernel(), self.arrays.items[0], step.tokens, self.arrays.numbers, step.numbers, x_at, added_at,
                most=self._most[0], stages=STAGES,
            )  # fmt: skip
        queries, attention = step.queries, self._attention
        # Keys and values are in the pool.
        attended = step.backend.forward_decode(queries, queries, queries, attention, forward_batch, False).contiguous()
        attended_at = attended.data_ptr()
        following = self._next
        if self._parallel:
            self._behind(1, step, PROJECT, attended_at, 0)
            attention_tensor_model_parallel_all_reduce(step.output)
            self._behind(2, step, FEED, 0, residual_at)
            tensor_model_parallel_all_reduce(step.hidden)
        else:
            parts = PROJECT | FEED if following is None else PROJECT | FEED | NEXT
            self._behind(3, step, parts, attended_at, residual_at)
        step.ready = following
        if self._last:
            stack.step = None
        return step.leave()

    def _behind(self, which: int, step: Step, parts: int, attended_at: int, residual_at: int) -> None:
        following = self if self._next is None else self._next
        run(
            behind_kernel(), self.arrays.items[which], step.tokens, self.arrays.numbers, following.arrays.numbers,
            step.numbers, parts, attended_at, residual_at, most=self._most[which], stages=STAGES,
        )  # fmt: skip


def _nothing(named: dict[str, Any]) -> bool:
    """Whether a call gives nothing by name."""
    return not named or all(value is None for value in named.values())
