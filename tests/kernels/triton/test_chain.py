"""The whole chain on a GPU is the chain of torch references, and docs/design.md "Exactly" in float64; in seven launches.

Red when: an operation hands another one something else than it reads, a stale or uninitialised number is used, a launch or a
copy more is made, the recalled mass is another one, or the workspace does not fit a step.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.checks import IndexChecks
from sglang_clusterkv.kernels.decode import cpu, reference
from sglang_clusterkv.kernels.decode.triton import TritonDecoder, decoder_of, last_read, sparse_decode
from sglang_clusterkv.kernels.merge.triton import merge_kernel
from sglang_clusterkv.kernels.refine import triton as refine_triton
from sglang_clusterkv.kernels.select import triton as select_triton
from sglang_clusterkv.kernels.step_model import StepShape, sparse_launches
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS
from sglang_clusterkv.memory.index import OUT_OF_RANGE, ClusterIndex
from sglang_clusterkv.memory.rotation import rotation_signs
from sglang_clusterkv.memory.step import SparseStep
from tests.support import exactly as ex
from tests.support.filled import LENGTHS, SCALE, Guarded, assert_close, index_on, mixed, scene_of, step_on

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
MOST_LAUNCHES = 7


class Chain:
    """One step on one device, its workspace poisoned."""

    def __init__(
        self,
        config: ClusterKVConfig,
        device: str,
        *,
        head_dim: int = 64,
        group: int = 3,
        dtype: torch.dtype = torch.float32,
        kv_heads: int = 2,
        sinks: bool = False,
    ) -> None:
        self.scene, step = scene_of(config, head_dim, dtype, kv_heads)
        self.device, self.dtype, self.group = device, dtype, group
        self.index, self.step = index_on(self.scene.index, device), step_on(step, device)
        self.pool = self.scene.keys[0].to(device), self.scene.values[0].to(device)
        generator = torch.Generator().manual_seed(group)
        self.q = torch.randn(step.batch, kv_heads * group, head_dim, generator=generator).to(device, dtype)
        self.sinks = (5 + 4 * torch.randn(kv_heads * group, generator=generator)).to(device) if sinks else None
        self.guarded = Guarded(device)
        self.poison(self.index)

    def poison(self, index: ClusterIndex) -> None:
        """Give the index a decoder with a poisoned workspace."""
        index.scratch["triton decoder", self.group] = TritonDecoder(index, self.group, self.guarded)

    def arguments(self, requests: slice = slice(None)) -> tuple[object, ...]:
        return self.q[requests], *self.pool, self.index, 0, some(self.step, requests), SCALE, None, self.sinks

    def result(self, requests: slice = slice(None)) -> torch.Tensor:
        result = sparse_decode(*self.arguments(requests))
        self.guarded.assert_untouched()
        return result

    def assert_is_reference(self) -> None:
        result, mass = self.result(), self.index.mass[0].clone()
        self.index.mass_cells.zero_()
        expected = reference.sparse_decode(*self.arguments())
        assert result.dtype is self.dtype and result.shape == expected.shape
        if self.dtype is torch.float32:
            assert_close(result, expected, self.dtype)
        else:  # the interpreter cuts a bf16 off instead of rounding it
            torch.testing.assert_close(result.float(), expected.float(), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(mass, self.index.mass[0], atol=2e-3 * float(mass[1]), rtol=0)


def some(step: SparseStep, requests: slice) -> SparseStep:
    """The lists of some requests."""
    lists = [value[requests].contiguous() if isinstance(value, torch.Tensor) else value for value in step]
    return SparseStep(*lists)._replace(batch=len(step.page_count[requests]))


@pytest.mark.parametrize(
    ("fields", "head_dim", "group", "dtype", "kv_heads", "sinks"),
    [
        ({}, 64, 3, torch.float32, 2, True),
        ({"centroid_dtype": "int8", "code_bits": 1}, 64, 1, torch.float16, 1, False),
        ({"centroid_dtype": "bf16"}, 96, 4, torch.bfloat16, 1, False),
        ({"refine": False}, 64, 1, torch.float32, 1, False),
        ({"estimate": False}, 64, 1, torch.float32, 1, True),
        ({"estimate_clusters": 4096}, 64, 1, torch.float32, 1, False),
        ({"estimate_clusters": 4, "budget_tokens": 8}, 64, 1, torch.float32, 1, False),  # by a shortlist
    ],
)
def test_the_chain_equals_the_reference(
    fields: dict[str, object], head_dim: int, group: int, dtype: torch.dtype, kv_heads: int, sinks: bool, device: str
) -> None:
    config = msgspec.structs.replace(CONFIG, **fields)
    chain = Chain(config, device, head_dim=head_dim, group=group, dtype=dtype, kv_heads=kv_heads, sinks=sinks)
    chain.assert_is_reference()


@pytest.mark.parametrize("fields", [{}, {"moving_values": "always"}])
def test_with_as_many_programs_as_a_server_has_it_does_too(
    fields: dict[str, object], as_served: None, device: str
) -> None:
    Chain(msgspec.structs.replace(CONFIG, **fields), device).assert_is_reference()


@pytest.mark.parametrize(("kinds", "fields"), [("sd", {}), ("-s", {}), ("d-", {}), ("ds", {"estimate": False})])
def test_a_mixture_is_each_request_alone(kinds: str, fields: dict[str, object], device: str) -> None:
    """And only sparse ones count for the recalled mass."""
    chain = Chain(msgspec.structs.replace(CONFIG, **fields), device)
    sparse = reference.sparse_decode(*chain.arguments())
    chain.index.mass_cells.zero_()
    plain = scene_of(chain.index.config, 64, torch.float32, 2)[1]
    chain.step = step_on(mixed(plain, chain.scene, kinds), device)
    result = chain.result()
    for b, kind in enumerate(kinds):
        if kind == "s":
            assert_close(result[b], sparse[b], torch.float32)
        elif kind == "-":
            assert not result[b].any()
        else:
            slots = chain.scene.slots(b + 1, LENGTHS[b]).to(device)[None]
            lengths = torch.tensor([LENGTHS[b]], device=device)
            whole = attend_reference.dense_decode(chain.q[b : b + 1], *chain.pool, slots, lengths, SCALE)
            assert_close(result[b], whole[0], torch.float32)
    assert chain.index.mass[0, 1] == kinds.count("s") * chain.q.shape[1]


def test_queries_cut_from_a_wider_product_are_read_where_they_lie(device: str) -> None:
    chain = Chain(CONFIG, device)
    whole = chain.result()
    wide = torch.cat((chain.q.flatten(1), torch.full_like(chain.q.flatten(1), torch.nan)), 1)
    chain.q = wide[:, : chain.q.shape[1] * chain.q.shape[2]].unflatten(1, chain.q.shape[1:])
    assert not chain.q.is_contiguous()
    assert torch.equal(chain.result(), whole)


@pytest.mark.parametrize("fields", [{}, {"estimate": False}, {"refine": False}])
def test_what_was_read_of_a_request_is_in_the_workspace(fields: dict[str, object], device: str) -> None:
    """As the CPU's buffers have it, which tests/clusters/test_trace.py compares with the references."""
    chain = Chain(msgspec.structs.replace(CONFIG, **fields), device)
    chain.result()
    host = index_on(chain.scene.index, "cpu")
    step = step_on(chain.step, "cpu")
    cpu.sparse_decode(chain.q.cpu(), *(buffer.cpu() for buffer in chain.pool), host, 0, step, SCALE)
    for place in range(chain.step.batch):
        found = last_read(decoder_of(chain.index, chain.group), place)
        expected = cpu.last_read(cpu.decoder_of(host, chain.group, torch.float32), place)
        assert found.count.tolist() == expected.count.tolist()
        for head, count in enumerate(expected.count.tolist()):
            assert set(found.recalled[head, :count].tolist()) == set(expected.recalled[head, :count].tolist())
        assert_close(found.base_logit.logsumexp(-1).cpu(), expected.base_logit.logsumexp(-1), torch.float32)
        assert_close(found.exact_lse.cpu(), expected.exact_lse, torch.float32)
        assert_close(found.whole_lse.cpu(), expected.whole_lse, torch.float32)


def test_the_chain_is_exact_in_float64(device: str) -> None:
    """From keys, values and queries alone: the oracle clusters, stores and decodes for itself."""
    config = msgspec.structs.replace(CONFIG, window_tokens=64)
    chain = Chain(config, device, group=1)
    result = chain.result().cpu()
    options = ex.Options(**{name: getattr(config, name) for name in ex.Options._fields})
    rotation = ex.hadamard_rotation(64, rotation_signs(64).numpy())
    for row, length in enumerate(LENGTHS, 1):
        slots = chain.scene.slots(row, length)
        recallable = [
            (s.begin, s.end)
            for s in chain.scene.engine.records.rows[row].segments
            if s.end <= length - config.window_tokens
        ]
        for head in range(2):
            keys, values = (ex.f64(buffer[0][slots, head].numpy()) for buffer in (chain.scene.keys, chain.scene.values))
            q = ex.f64(chain.q[row - 1, head : head + 1].cpu().numpy())
            whole = ex.request_output(
                q, keys, values, SCALE, recallable, rotation, options, outlier_share=config.outlier_share
            )
            torch.testing.assert_close(
                result[row - 1, head : head + 1].double(), torch.from_numpy(whole.output), atol=1e-4, rtol=1e-3
            )


def test_rows_without_pages_are_left_alone_and_clusters_may_begin_anywhere(device: str) -> None:
    """As a captured graph has them: a row of padding between two others, whose clusters lie one after the other."""
    chain = Chain(CONFIG, device, group=1, kv_heads=1)
    whole = reference.sparse_decode(*chain.arguments())
    rows = torch.tensor([0, 1, 1], device=device)
    step = SparseStep(*(value[rows] if isinstance(value, torch.Tensor) else value for value in chain.step))
    step = step._replace(batch=3)
    step.page_count[1] = step.base_count[1] = 0
    decoder = decoder_of(chain.index, 1)
    decoder.prepare(step)
    w = decoder.workspace
    room = [triton.cdiv(int(pages) * 2, SCORE_CLUSTERS) * SCORE_CLUSTERS for pages in step.page_count]
    w.offset[:4] = torch.tensor([0, *itertools.accumulate(room)])
    assert w.offset[1] == w.offset[2] < w.offset[3]
    result = sparse_decode(chain.q[rows], *chain.pool, chain.index, 0, step, SCALE)
    chain.guarded.assert_untouched()
    assert_close(result[[0, 2]], whole, torch.float32)
    assert w.candidate_count[1] == 0 and w.recalled_count[1] == 0
    assert w.total[1] == -torch.inf and (decoder.part_lses(1)[1] == -torch.inf).all()


class Operations(TorchDispatchMode):
    """Notes torch operations that compute or copy, but those of Triton's interpreter, and the grids of launches."""

    FREE = ("aten.empty", "aten.view", "aten._unsafe_view", "aten.select", "aten.slice", "aten.alias", "aten.detach")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.programs: list[int] = []
        self._launching = False

    def watch_launches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note kernels' launches from now on."""
        run = type(merge_kernel).run

        def noted(kernel: object, *args: object, grid: tuple[int, ...], **kwargs: object) -> object:
            self.programs.append(math.prod(grid))
            self._launching = True
            try:
                return run(kernel, *args, grid=grid, **kwargs)
            finally:
                self._launching = False

        monkeypatch.setattr(type(merge_kernel), "run", noted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._launching and not str(func).startswith(self.FREE):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fields", "launches"), [({}, 7), ({"refine": False}, 7), ({"estimate": False}, 7)])
def test_a_layer_is_seven_launches_and_nothing_else(
    fields: dict[str, object], launches: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(CONFIG, **fields)
    chain = Chain(config, device, group=1)
    requests = slice(0, 1)
    arguments = chain.arguments(requests)
    sparse_decode(*arguments)  # views of the index and the workspace are made once
    operations = Operations()
    operations.watch_launches(monkeypatch)
    with operations:
        sparse_decode(*arguments)
    assert operations.names == []
    assert len(operations.programs) == launches <= MOST_LAUNCHES
    shape = StepShape(layers=1, heads=2, kv_heads=2, head_dim=64, batch=1, context=LENGTHS[0], item_bytes=4)
    assert operations.programs == [launch.programs for launch in sparse_launches(shape, config)]


def test_an_operation_more_is_noticed(device: str) -> None:
    """What the test above relies on."""
    with Operations() as operations:
        torch.zeros(3, device=device).view(3, 1)
    assert operations.names == ["aten.zeros.default"]


def test_steps_of_other_sizes_find_room(device: str) -> None:
    """Longer, shorter and more requests, one after the other, in one workspace that is larger than they need."""
    chain = Chain(CONFIG, device, group=1, kv_heads=1)
    whole = reference.sparse_decode(*chain.arguments())
    decoder = decoder_of(chain.index, 1)
    capacities = []
    for requests in (slice(0, 1), slice(0, 2), slice(0, 1)):
        assert_close(chain.result(requests), whole[requests], torch.float32)
        capacities.append(decoder.workspace.shape)
    assert capacities[0] != capacities[1] == capacities[2]


def test_memory_that_ran_out_leaves_room_for_a_smaller_step(device: str) -> None:
    chain = Chain(CONFIG, device, group=1, kv_heads=1)
    whole = reference.sparse_decode(*chain.arguments())
    decoder = decoder_of(chain.index, 1)
    allocate, taken = decoder._allocate, []

    def short(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if len(sizes) > 1 and sizes[0] > 1 and len(taken) == 2:
            raise torch.OutOfMemoryError("no memory for the third tensor of two requests")
        taken.append(sizes)
        return allocate(sizes, dtype)

    for requests in (slice(0, 1), slice(1, 2)):
        taken.clear()
        decoder._allocate = short
        with pytest.raises(torch.OutOfMemoryError, match="third"):
            chain.result(slice(0, 2))
        assert_close(chain.result(requests), whole[requests], torch.float32)
    decoder._allocate = allocate
    assert_close(chain.result(slice(0, 2)), whole[:2], torch.float32)


def test_a_long_request_does_not_keep_a_large_batch_from_running(device: str) -> None:
    """Each fits, a workspace for both at once does not."""
    chain = Chain(CONFIG, device, group=1, kv_heads=1)
    decoder = decoder_of(chain.index, 1)
    allocate = decoder._allocate

    def small(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if sizes[0] > 1 and sizes[-1] > 4096:
            raise torch.OutOfMemoryError("many requests, and long ones")
        return allocate(sizes, dtype)

    decoder._allocate = small
    few = some(chain.step, slice(0, 1))
    decoder.prepare(few._replace(pages=few.pages.repeat(1, 1 + 8192 // few.pages.shape[1])))
    assert decoder.workspace.shape.clusters > 8192
    whole = reference.sparse_decode(*chain.arguments())
    assert_close(chain.result(), whole, torch.float32)


def test_a_step_does_not_depend_on_the_one_before(device: str) -> None:
    """Bit for bit, though the workspace holds what another step left."""
    chain = Chain(CONFIG, device, group=1, kv_heads=1)
    first = chain.result(slice(0, 1))
    chain.result(slice(1, 2))
    assert torch.equal(first, chain.result(slice(0, 1)))


def test_a_checked_chain_is_the_chain_and_survives_wrong_indices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CLUSTERKV_CHECK=1: right indices change nothing; wrong ones of select and refine are counted, not followed."""
    chain = Chain(CONFIG, device)
    plain, index = chain.result(), chain.index
    index.checks = IndexChecks(index, index.violations[OUT_OF_RANGE])
    assert torch.equal(chain.result(), plain) and int(index.violations[OUT_OF_RANGE]) == 0
    select, values = select_triton.select, refine_triton.refine_values

    def spoiled_select(index: Any, step: Any, limit: int, w: Any, *of: Any) -> None:
        select(index, step, limit, w, *of)
        w.candidates[0, 0, 0] = 1 << 50 | 1 << 20

    def spoiled_values(index: Any, layer: int, step: Any, scale: float, limit: int, w: Any, *of: Any) -> None:
        values(index, layer, step, scale, limit, w, *of)
        w.position[0, 1, 0] = 1 << 28

    monkeypatch.setattr(select_triton, "select", spoiled_select)
    monkeypatch.setattr(refine_triton, "refine_values", spoiled_values)
    assert chain.result().isfinite().all() and int(index.violations[OUT_OF_RANGE]) == 3
