"""What a captured layer does in Python is safe to capture: on tensors of a GPU that are fake, so that no GPU is needed.

A fake tensor has a device, a shape and no contents: whoever asks for a number of it ends in an error, as in a capture. The
layer is the whole of it, from the backend's forward_decode on; its launches are noted and not made. Red when: a layer asks for
a number or for how many of something there are, copies from or to the host, allocates on the host, computes beside its
launches, or hands a launch a tensor of the host. Mutants show each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import triton as decode_triton
from sglang_clusterkv.kernels.merge.triton import merge_kernel
from sglang_clusterkv.kernels.score import triton as score_triton
from sglang_clusterkv.kernels.score.triton import score_kernel
from sglang_clusterkv.kernels.select import triton as select_triton
from sglang_clusterkv.memory import rotation
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep
from sglang_clusterkv.serving import active, graphs
from sglang_clusterkv.serving.backend import ClusterKVAttnBackend
from tests.support import flashinfer_stand_in as stand_in
from tests.support.graph import KINDS, Capture

HEADS, GROUP, HEAD_DIM, PAGES, CONTEXT, BATCH, MOST = 2, 4, 128, 64, 1024, 3, 4
ERRORS = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)


class FakeLayer:
    """A backend over a pool and an engine of fake tensors, and what its captured layer launches."""

    def __init__(self, config: ClusterKVConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.mode = FakeTensorMode()
        monkeypatch.setattr(active, "active_config", lambda: config)
        monkeypatch.setattr("sglang_clusterkv.serving.backend.KVWriteLoc.for_layer", lambda *of: None)
        with self.mode:
            shape = (PAGES * 16, HEADS, HEAD_DIM)
            self.keys, self.values = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            self.index = ClusterIndex(config, Geometry(1, HEADS, HEAD_DIM, 16, PAGES), "cuda")
            rows = torch.empty((8, CONTEXT), dtype=torch.int32, device="cuda")
            self.engine = ClusterEngine(self.index, [self.keys], [self.values], rows, HandedOut(), group=GROUP)
            self.engine.decoding.reserve(MOST, CONTEXT)
            product = torch.empty((BATCH, HEADS * (GROUP + 2) * HEAD_DIM), dtype=torch.bfloat16, device="cuda")
            # As a model cuts them.
            self.q, self.k, self.v = product.split([HEADS * GROUP * HEAD_DIM, HEADS * HEAD_DIM, HEADS * HEAD_DIM], 1)
        self.backend: Any = object.__new__(ClusterKVAttnBackend)
        vars(self.backend).update(
            prefill=object(), engine=self.engine, first_layer=0, _tier_prefill=None, _prefill_decodes=True,
            calls_prefill=False, _in_capture=True, token_to_kv_pool=self, _dense_layers={}, _said=set(),
        )  # fmt: skip

    # The pool's.
    dtype = torch.bfloat16

    def get_kv_buffer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def set_kv_buffer(self, *of: Any) -> None:
        """SGLang's own kernel."""

    def layer(self, lists: SparseStep) -> torch.Tensor:
        """The model's attention in a captured step."""
        nobody = np.zeros(0, np.int64)
        self.backend._step = graphs.DecodeStep(None, lists, None, None, nobody, nobody)
        layer: Any = SimpleNamespace(
            layer_id=0, sliding_window_size=-1, logit_cap=0.0, scaling=0.2, tp_q_head_num=HEADS * GROUP,
            head_dim=HEAD_DIM,
        )  # fmt: skip
        return self.backend.forward_decode(self.q, self.k, self.v, layer, SimpleNamespace(batch_size=BATCH))

    def capture(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """What the layer launches; raises where it is not safe to capture."""
        capture = Capture("cuda")
        with self.mode, self.monkeypatch.context() as patched:
            for kind in KINDS:
                patched.setattr(kind, "run", lambda *of, **named: None)
            lists = self.engine.decoding.captured(BATCH)
            self.layer(lists)  # SGLang warms up before it captures
            for kind in KINDS:
                patched.setattr(kind, "run", capture.noting(lambda *_, **__: None))
            with capture:
                output = self.layer(lists)
        assert output.shape == (BATCH, HEADS * GROUP * HEAD_DIM) and output.device.type == "cuda"
        for kernel, arguments, named in capture.launches:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            assert tensors and all(tensor.device.type == "cuda" for tensor in tensors), f"{kernel} reads the host"
        return capture.launches


@pytest.fixture(autouse=True)
def tables_of_this_test() -> Iterator[None]:
    """Tables that are made once per process are made here, and not handed to tests of real tensors."""
    made_once = [rotation.rotation_matrix, score_triton.rotation_parts]
    for table in made_once:
        table.cache_clear()
    yield
    for table in made_once:
        table.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLayer:
    return FakeLayer(ClusterKVConfig(), monkeypatch)


@pytest.mark.parametrize("fields", [{}, {"refine": False}, {"estimate": False}])
def test_a_captured_layer_is_its_launches(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launches = FakeLayer(ClusterKVConfig(**fields), monkeypatch).capture()
    assert len(launches) > 5 and launches[0][0] is score_kernel and launches[-1][0] is merge_kernel


def test_a_captured_layer_in_which_flashinfer_attends_is_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, HEADS)
    fake = FakeLayer(ClusterKVConfig(attend_engine="flashinfer"), monkeypatch)
    kernels = [kernel for kernel, _, _ in fake.capture()]
    assert decode_triton.decoder_of(fake.index, GROUP).engine is not None
    assert kernels.count(stand_in.ATTENTION) == 1 and len(kernels) == 9 and kernels[-1] is merge_kernel


UNSAFE: dict[str, Callable[[SparseStep], object]] = {
    "a number": lambda step: int(step.page_count.max()),
    "a condition": lambda step: bool(step.dense_count.any()),
    "how many": lambda step: step.page_count.nonzero(),
    "a mask": lambda step: step.pages[step.pages > 0],
    "a copy to the host": lambda step: step.page_count.cpu(),
    "a copy to the host that waits for nothing": lambda step: step.page_count.to("cpu", non_blocking=True),
    "a copy from the host": lambda step: torch.zeros(3).to("cuda"),
    "numbers of the host": lambda step: torch.tensor([1, 2], device="cuda"),
    "a buffer on the host": lambda step: torch.empty(3),
    "a computation": lambda step: step.page_count + 1,
    "zeros": lambda step: torch.zeros(3, device="cuda"),
    "a list": lambda step: step.page_count.tolist(),
    "a shape that depends on contents": lambda step: torch.empty(int(step.page_count[0]), device="cuda"),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_what_is_unsafe_to_capture_is_noticed(what: str, fake: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    select = select_triton.select

    def mutant(index: Any, step: SparseStep, *of: Any) -> None:
        UNSAFE[what](step)
        select(index, step, *of)

    monkeypatch.setattr(select_triton, "select", mutant)
    with pytest.raises(ERRORS):
        fake.capture()


def test_a_copy_of_the_queries_is_noticed(fake: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's are cut from one product with keys and values."""
    decode = decode_triton.sparse_decode
    monkeypatch.setattr(decode_triton, "sparse_decode", lambda q, *of, **named: decode(q.contiguous(), *of, **named))
    with pytest.raises(AssertionError, match="in a captured step"):
        fake.capture()


def test_a_launch_that_reads_the_host_is_noticed(fake: FakeLayer) -> None:
    with fake.mode:
        decoder = decode_triton.decoder_of(fake.index, GROUP)
        assert decoder._reserved is not None
        decoder._reserved = dataclasses.replace(decoder._reserved, dot=torch.empty(decoder._reserved.dot.shape))
    with pytest.raises(AssertionError, match="reads the host"):
        fake.capture()
