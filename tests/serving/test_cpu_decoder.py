"""What a decoder layer of ours finds and leaves between SGLang's layers, and where it leaves a layer to SGLang.

Whole models are compared with SGLang's modules, to the bit, in tests/serving/matrix, where hooks, other modules and other
weights are put into them too.

Red when: a layer reads another input or residual than SGLang's next boundary would, misses what somebody wrote to them between
two layers, takes one of another type or shape, or another update than a sum; when an array of another type, shape or order, or
none in memory, is read; or when a layer that is none of those we know, or of a server that does not want it, is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import sglang.srt.platforms  # before SGLang's layers, which ask for the platform  # noqa: F401
import torch
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD, REPLACE_AT_EXIT
from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_clusterkv.kernels.layer_cpu import rms_norm, rotate, silu_and_mul
from sglang_clusterkv.kernels.products_cpu import linear
from sglang_clusterkv.serving import cpu_decoder
from sglang_clusterkv.serving.cpu_decoder import Scratch, Step
from sglang_clusterkv.serving.plain_layers import Shape, is_plain
from sglang_clusterkv.serving.platform import LAYERS

TOKENS, WIDTH = 2, 64


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As in a scheduler."""
    with torch.inference_mode():
        yield


@pytest.fixture
def step() -> Step:
    """Of a batch whose layers begin."""
    places = torch.arange(TOKENS)
    batch: Any = SimpleNamespace(batch_size=TOKENS, out_cache_loc=places, residual_stream=ResidualStream())
    shape = Shape(WIDTH, heads=2, kv_heads=1, head_dim=32, inner=96, of_heads=False)
    return Step(batch, object(), places, Scratch(TOKENS, shape))  # type: ignore[arg-type]


def test_the_first_layer_has_nothing_to_add(step: Step) -> None:
    x = torch.randn(TOKENS, WIDTH)
    assert step.input(x) == (x.data_ptr(), 0, x.data_ptr())


def test_a_layer_leaves_what_the_next_boundary_takes(step: Step) -> None:
    step.input(torch.randn(TOKENS, WIDTH))
    output = step.leave()
    stream = step.batch.residual_stream
    assert stream.export(output) == (step.hidden, step.residual) and stream.pending.update is PLAIN_ADD
    x_at, added_at, sum_at = step.input(output)
    assert (x_at, added_at) == (step.hidden.data_ptr(), step.residual.data_ptr()) and sum_at not in (x_at, added_at)


def test_a_layer_reads_what_sglangs_left(step: Step) -> None:
    stream, x, residual = step.batch.residual_stream, torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    stream.write(residual)
    stream.record(x, PLAIN_ADD)
    x_at, added_at, _ = step.input(x)
    assert (x_at, added_at) == (x.data_ptr(), residual.data_ptr())


@pytest.mark.parametrize(
    ("x", "residual", "update"),
    [
        (torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16), None, PLAIN_ADD),
        (torch.zeros(WIDTH, TOKENS).T, None, PLAIN_ADD),
        (torch.zeros(TOKENS + 1, WIDTH), None, PLAIN_ADD),
        (torch.zeros(TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH, dtype=torch.float64), PLAIN_ADD),
        (torch.zeros(TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH), REPLACE_AT_EXIT),
    ],
)
def test_anything_else_is_left_to_sglangs_layer(
    step: Step, x: torch.Tensor, residual: torch.Tensor | None, update: Any
) -> None:
    stream = step.batch.residual_stream
    if residual is not None:
        stream.write(residual)
        stream.record(x, update)
    assert step.input(x) is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "of_heads", "most"),
    [(32, 8, False, 8), (8, 1, False, 8), (16, 8, True, 8), (128, 8, True, 4), (8, 1, True, 1)],
)
def test_heads_are_normed_where_sglangs_norms_are_ours(heads: int, kv_heads: int, of_heads: bool, most: int) -> None:
    assert cpu_decoder._most_tokens(Shape(64, heads, kv_heads, 16, 128, of_heads)) == most


def test_other_layers_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.TransformerDecoderLayer(8, 2))
    assert not any(map(is_plain, model.modules()))
    assert cpu_decoder.take_over(model) == 0
    monkeypatch.setattr(cpu_decoder, "is_plain", lambda module: True)
    monkeypatch.setenv(LAYERS, "0")
    assert cpu_decoder.take_over(model) == 0


# Arrays of less than 256 bytes may lie so near to each other that loops over them add in another order.
HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS_OF_MODEL = 4, 2, 32, 96, 3


class Plain(torch.nn.Module):
    """Stands for a decoder layer of SGLang's, and for its parts, which have what `cpu_decoder` reads of them."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, batch: Any, capture_output: Any = None) -> Any:
        """By kernels that are called alone."""
        stream, inside = batch.residual_stream, self.self_attn
        x, added = stream.export(hidden)
        if capture_output is not None:
            capture_output(x)
        before, behind, turns = self.input_layernorm, self.post_attention_layernorm, inside.rotary_emb
        normed, whole = rms_norm(x, added, before.weight, before.variance_epsilon)
        sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        q, k, v = linear(normed, inside.qkv_proj.weight).split(sizes, 1)
        halves = turns.is_neox_style
        q, k = (rotate(part, positions, turns.cos_sin_cache, HEAD_DIM, halves=halves) for part in (q, k))
        pool = batch.backend.token_to_kv_pool
        pool.k_buffer[inside.attn.layer_id][batch.out_cache_loc] = k.view(-1, KV_HEADS, HEAD_DIM)
        pool.v_buffer[inside.attn.layer_id][batch.out_cache_loc] = v.reshape(-1, KV_HEADS, HEAD_DIM)
        attended = linear(batch.backend.forward_decode(q, k, v, inside.attn, batch, False), inside.o_proj.weight)
        whole = x if whole is None else whole
        normed, residual = rms_norm(attended, whole, behind.weight, behind.variance_epsilon)
        stream.write(residual)
        gated = silu_and_mul(linear(normed, self.mlp.gate_up_proj.weight))
        return stream.record(linear(gated, self.mlp.down_proj.weight), PLAIN_ADD)


class Backend:
    """Attends to what lies at each token's slot."""

    prefill = None

    def __init__(self) -> None:
        shape = (16, KV_HEADS, HEAD_DIM)
        buffers = [[torch.zeros(shape) for _ in range(LAYERS_OF_MODEL)] for _ in range(2)]
        self.token_to_kv_pool = SimpleNamespace(k_buffer=buffers[0], v_buffer=buffers[1], start_layer=0)

    def forward_decode(self, q: Any, k: Any, v: Any, attn: Any, batch: Any, save: bool) -> torch.Tensor:
        pool, slots = self.token_to_kv_pool, batch.out_cache_loc
        both = pool.k_buffer[attn.layer_id][slots] + 2 * pool.v_buffer[attn.layer_id][slots]
        return q * both.repeat_interleave(HEADS // KV_HEADS, 1).flatten(1)


def plain_layer(number: int) -> Plain:
    """With weights of its own."""

    def product(rows: int, channels: int) -> Plain:
        method = SimpleNamespace(weights=lambda weight: (weight.data_ptr(), 0))
        weight = torch.nn.Parameter(torch.randn(rows, channels) / channels**0.5, requires_grad=False)
        return Plain(weight=weight, bias=None, quant_method=method)

    def norm(eps: float) -> Plain:
        return Plain(weight=torch.nn.Parameter(torch.rand(WIDTH) + 0.5, requires_grad=False), variance_epsilon=eps)

    attn = Plain(layer_id=number, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, head_dim=HEAD_DIM)
    return Plain(
        self_attn=Plain(
            qkv_proj=product((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH),
            o_proj=product(WIDTH, HEADS * HEAD_DIM),
            rotary_emb=Plain(cos_sin_cache=torch.randn(32, HEAD_DIM), is_neox_style=True),
            attn=attn,
        ),
        mlp=Plain(gate_up_proj=product(2 * INNER, WIDTH), down_proj=product(WIDTH, INNER)),
        input_layernorm=norm(1e-5),
        post_attention_layernorm=norm(2e-5),
    )


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> torch.nn.ModuleList:
    """Of a model that was taken over."""
    torch.manual_seed(5)
    monkeypatch.setattr(cpu_decoder, "is_plain", lambda module: hasattr(module, "self_attn"))
    monkeypatch.setattr(cpu_decoder, "_plain_pool", lambda pool: True)
    monkeypatch.setattr(cpu_decoder, "ClusterKVAttnBackend", Backend)
    monkeypatch.setattr(cpu_decoder, "get_parallel", lambda: SimpleNamespace(tp_size=1, tp_rank=0))
    found = torch.nn.ModuleList(plain_layer(number) for number in range(LAYERS_OF_MODEL))
    assert cpu_decoder.take_over(found) == LAYERS_OF_MODEL
    return found


class Ran(NamedTuple):
    """A decode step: what the last layer left, keys and values, and which layers SGLang's modules ran."""

    left: tuple[torch.Tensor, torch.Tensor]
    stored: list[torch.Tensor]
    by_modules: list[int]


def batch_of(mode: ForwardMode) -> tuple[Any, Backend, torch.Tensor]:
    """With its backend and positions."""
    backend = Backend()
    batch = SimpleNamespace(
        batch_size=TOKENS, out_cache_loc=torch.tensor([9, 4]), residual_stream=ResidualStream(), forward_mode=mode,
        backend=backend,
    )  # fmt: skip
    return batch, backend, torch.tensor([31, 0])


def ran(
    monkeypatch: pytest.MonkeyPatch,
    layers: Any,
    captures: int = -1,
    mode: ForwardMode = ForwardMode.DECODE,
    between: Callable[[torch.Tensor, ResidualStream], Any] = lambda hidden, stream: None,
    moved: dict[int, torch.Tensor] | None = None,
) -> Ran:
    """`between`: what the model does between two layers. `moved`: positions of a layer that has others."""
    generator, by_modules = torch.Generator().manual_seed(7), []
    batch, backend, positions = batch_of(mode)
    monkeypatch.setattr(cpu_decoder, "get_attn_backend", lambda: backend)
    own = Plain.forward

    def noted(self: Plain, *args: Any, **named: Any) -> Any:
        by_modules.append(self.self_attn.attn.layer_id)
        return own(self, *args, **named)

    for ours in layers[0].forward.__self__._stack.layers:
        monkeypatch.setattr(ours, "_own", noted.__get__(ours._own.__self__))
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    for number, layer in enumerate(layers):
        named = {"capture_output": print} if number == captures else {"capture_output": None}
        hidden = layer((moved or {}).get(number, positions), hidden, batch, **named)
        between(hidden, batch.residual_stream)
    pool = backend.token_to_kv_pool
    return Ran(batch.residual_stream.export(hidden), [*pool.k_buffer, *pool.v_buffer], by_modules)


def test_a_model_runs_by_ours_in_decode_steps_alone_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, layers: Any
) -> None:
    everything = [*range(LAYERS_OF_MODEL)]
    expected = ran(monkeypatch, layers, mode=ForwardMode.EXTEND)
    assert expected.by_modules == everything
    ours = ran(monkeypatch, layers)
    captured = ran(monkeypatch, layers, captures=1)
    assert ours.by_modules == [] and captured.by_modules == [1]
    hook = layers[2].mlp.register_forward_hook(lambda *_: None)
    watched = ran(monkeypatch, layers)
    hook.remove()
    assert watched.by_modules == everything and ran(monkeypatch, layers).by_modules == []
    own = Plain.forward
    with monkeypatch.context() as patched:
        patched.setattr(Plain, "forward", lambda self, *args, **named: own(self, *args, **named))
        assert ran(monkeypatch, layers).by_modules == everything
    assert ran(monkeypatch, layers).by_modules == []
    for one in (ours, captured, watched):
        assert all(map(torch.equal, one.left, expected.left)) and all(map(torch.equal, one.stored, expected.stored))


def test_layers_of_another_type_are_not_taken(layers: Any) -> None:
    assert cpu_decoder.take_over(torch.nn.ModuleList([plain_layer(0).bfloat16()])) == 0


def as_modules(monkeypatch: pytest.MonkeyPatch, layers: Any, **more: Any) -> list[int]:
    """Which layers SGLang's modules run in a decode step; what it gives must be what they all give."""
    expected, found = (ran(monkeypatch, layers, mode=mode, **more) for mode in (ForwardMode.EXTEND, ForwardMode.DECODE))
    assert expected.by_modules == [*range(LAYERS_OF_MODEL)]
    assert all(map(torch.equal, found.left, expected.left)) and all(map(torch.equal, found.stored, expected.stored))
    return found.by_modules


def test_what_is_written_between_layers_is_read(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    """As SGLang's `add_to_output` does it; also through a view or a tensor that shares memory."""
    untouched = ran(monkeypatch, layers).left[0]
    edits: list[Callable[[torch.Tensor, ResidualStream], Any]] = [
        lambda hidden, stream: hidden.mul_(2),
        lambda hidden, stream: hidden[0].add_(1),
        lambda hidden, stream: hidden.detach().view(-1)[3:].zero_(),
        lambda hidden, stream: stream.residual.add_(1),
        lambda hidden, stream: stream.export(hidden)[1].view(-1).mul_(0.5),
        lambda hidden, stream: setattr(stream, "residual", stream.residual + 1),
    ]
    for edit in edits:
        by_modules = as_modules(monkeypatch, layers, between=edit)
        assert by_modules == [] and not torch.equal(ran(monkeypatch, layers, between=edit).left[0], untouched)


def test_a_layer_that_is_wrapped_or_watched_is_sglangs(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    everything = [*range(LAYERS_OF_MODEL)]

    class Doubles(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **named: Any) -> Any:
            output = self.inner(*args, **named)
            output.data.mul_(2)  # seen by nobody
            return output

    inner = layers[1]
    layers[1] = Doubles(inner)
    assert as_modules(monkeypatch, layers) == everything
    layers[1] = inner
    ours = inner.forward
    inner.forward = Doubles(ours).forward
    assert as_modules(monkeypatch, layers) == everything
    inner.forward = ours

    def behind(module: torch.nn.Module, given: Any, output: torch.Tensor) -> None:
        output[0].data.mul_(3)

    def before(module: torch.nn.Module, given: Any) -> None:
        given[1].data.add_(1)

    for register, hook in (
        (inner.register_forward_hook, behind),
        (inner.register_forward_pre_hook, before),
        (torch.nn.modules.module.register_module_forward_hook, lambda module, given, output: None),
    ):
        handle = register(hook)
        assert as_modules(monkeypatch, layers) == everything
        handle.remove()
    called = torch.nn.Module.__call__
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "__call__", lambda self, *args, **named: called(self, *args, **named))
        assert as_modules(monkeypatch, layers) == everything
    assert as_modules(monkeypatch, layers) == []


def test_layers_that_were_wrapped_before_are_not_taken(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    wrapped = torch.nn.ModuleList(torch.nn.Sequential(plain_layer(number)) for number in range(2))
    assert cpu_decoder.take_over(wrapped) == 0


def test_with_gradients_everything_is_sglangs(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        found = ran(monkeypatch, layers)
    assert found.by_modules == [*range(LAYERS_OF_MODEL)]


def test_a_layer_at_other_positions_is_sglangs(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    assert as_modules(monkeypatch, layers, moved={1: torch.tensor([7, 3])}) == [1]


def swapped(layer: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """Another tensor in the place of a layer's; returns how to put the first one back."""
    *path, last = name.split(".")
    part = layer
    for step in path:
        part = getattr(part, step)
    holder = part._parameters if last in part._parameters else vars(part)
    kept = holder[last]
    holder[last] = change(kept.detach())
    return lambda: holder.update({last: kept})


ARRAYS = [
    "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.rotary_emb.cos_sin_cache",
]  # fmt: skip
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another type": lambda x: x.double(),
    "another type at the same place": lambda x: x.view(torch.int32),
    "another order at the same place": lambda x: x.as_strided(x.shape, (0,) * x.dim()),
    "fewer at the same place": lambda x: x[..., : x.shape[-1] // 2],
    "another shape at the same place": lambda x: x.view(1, -1),
    "no memory": lambda x: x.to("meta"),
    "no memory, further on": lambda x: torch.cat([x, x]).to("meta")[1:],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_the_kernels_cannot_read_are_sglangs(
    monkeypatch: pytest.MonkeyPatch, layers: Any, name: str
) -> None:
    first = layers[0].forward.__self__._stack
    batch, backend, positions = batch_of(ForwardMode.DECODE)
    monkeypatch.setattr(cpu_decoder, "get_attn_backend", lambda: backend)
    for change in CHANGES.values():
        first.begin(positions, batch)
        assert first.step is not None
        back = swapped(layers[1], name, change)
        first.begin(positions, batch)
        assert first.step is None
        back()
    first.begin(positions, batch)
    assert first.step is not None


@pytest.mark.parametrize("which", ["k_buffer", "v_buffer"])
def test_pools_that_the_kernels_cannot_write_are_sglangs(
    monkeypatch: pytest.MonkeyPatch, layers: Any, which: str
) -> None:
    stack = layers[0].forward.__self__._stack
    batch, backend, positions = batch_of(ForwardMode.DECODE)
    monkeypatch.setattr(cpu_decoder, "get_attn_backend", lambda: backend)
    buffers = getattr(backend.token_to_kv_pool, which)
    kept = buffers[1]
    other: list[Callable[[torch.Tensor], torch.Tensor]] = [
        *CHANGES.values(), lambda x: x[:-1], lambda x: x.transpose(1, 2), lambda x: x[:8],
    ]  # fmt: skip
    for change in other:
        buffers[1] = change(kept)
        stack.begin(positions, batch)
        assert stack.step is None
    buffers[1] = kept
    stack.begin(positions, batch)
    assert stack.step is not None


def test_weights_elsewhere_shared_and_within_others_are_read(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    first, second = layers[0].mlp, layers[1].mlp
    kept = first.down_proj.weight.data
    first.down_proj.weight.data = torch.cat([torch.randn(5, INNER), kept, torch.randn(3, INNER)])[5 : 5 + WIDTH]
    second.down_proj.weight = first.down_proj.weight  # tied
    second.gate_up_proj.weight.data = torch.randn(3 * INNER, WIDTH)[INNER:]
    with torch.inference_mode(False):
        first.gate_up_proj.weight = torch.nn.Parameter(torch.randn(2 * INNER, WIDTH), requires_grad=True)
    assert as_modules(monkeypatch, layers) == []
    first.down_proj.weight.mul_(2)  # where it is
    assert as_modules(monkeypatch, layers) == []
    layers[2].self_attn.o_proj._parameters["bias"] = torch.nn.Parameter(torch.zeros(WIDTH + 1), requires_grad=False)
    assert as_modules(monkeypatch, layers) == [0, 1, 2]  # which add no bias here


def test_settings_of_norms_and_rotation_are_read_in_each_step(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    assert as_modules(monkeypatch, layers) == []
    layers[1].input_layernorm.variance_epsilon = 0.5
    layers[0].post_attention_layernorm.variance_epsilon = 0.25
    assert as_modules(monkeypatch, layers) == []
    layers[2].self_attn.rotary_emb.is_neox_style = False
    assert as_modules(monkeypatch, layers) == []


def test_a_bias_that_is_no_parameter_is_sglangs(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    layers[1].self_attn.qkv_proj.__dict__["bias"] = torch.randn((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    stack = layers[0].forward.__self__._stack
    batch, backend, positions = batch_of(ForwardMode.DECODE)
    monkeypatch.setattr(cpu_decoder, "get_attn_backend", lambda: backend)
    stack.begin(positions, batch)
    assert stack.step is None
