"""A decode graph without a GPU: what a capture launches, with the numbers and addresses of the capture, run again and again.

As with CUDA's graphs, a replay runs no Python of ours: a launch has the grid, the integers and the tensors that it had when it
was captured, and only what lies in these tensors may change. A capture ends with an AssertionError at every operation of torch
that computes, copies or waits; it may allocate, as graphs do from a pool of their own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_clusterkv.kernels.attend.flashinfer import FlashInferAttend
from sglang_clusterkv.kernels.merge.triton import merge_kernel
from sglang_clusterkv.kernels.workspace import Workspace
from sglang_clusterkv.memory.step import SparseStep
from tests.support.flashinfer_stand_in import Attention

FAR = 1 << 30
KINDS = (type(merge_kernel), Attention)  # of launches: Triton's, FlashInfer's


class Capture(TorchDispatchMode):
    """Notes launches, and raises at an operation of torch beside them.

    Args:
        device: type of the only one that may be allocated on; None: any.
    """

    FREE = (
        "prim.device",
        "aten.empty",
        "aten.view",
        "aten._unsafe_view",
        "aten.select",
        "aten.slice",
        "aten.alias",
        "aten.detach",
    )

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._launching = False

    def noting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What a kind of launches runs by, with each one noted."""
        return lambda kernel, *of, **named: self.note(run, kernel, of, named)

    def note(self, run: Callable[..., Any], kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A launch: note it, and run it."""
        self.launches.append((kernel, arguments, named))
        self._launching = True
        try:
            return run(kernel, *arguments, **named)
        finally:
            self._launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert self._launching or str(func).startswith(self.FREE), f"{func} in a captured step"
        result = func(*args, **(kwargs or {}))
        if self._device is not None and not self._launching and isinstance(result, torch.Tensor):
            assert result.device.type == self._device, f"{func} on {result.device} in a captured step"
        return result


class Graph:
    """A captured call.

    Attributes:
        output: what it gave; replays write there.
    """

    def __init__(self, call: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        call()  # SGLang warms up before it captures: what is made once is there
        capture = Capture()
        with monkeypatch.context() as patched, capture:
            for kind in KINDS:
                patched.setattr(kind, "run", capture.noting(kind.run))
            self.output = call()
        self._launches = capture.launches

    def replay(self) -> torch.Tensor:
        """The same launches again."""
        self.output.fill_(torch.nan)
        for kernel, arguments, named in self._launches:
            kernel.run(*arguments, **named)
        return self.output

    def addresses(self) -> set[int]:
        """Of all tensors that its launches have."""
        return {value.data_ptr() for _, of, _ in self._launches for value in of if isinstance(value, torch.Tensor)}


def poison_workspace(workspace: Workspace) -> None:
    """Nothing in it may be read before it is written, but where requests' clusters begin: that is a list of the step."""
    for field in dataclasses.fields(workspace):
        value = getattr(workspace, field.name)
        if isinstance(value, torch.Tensor) and field.name != "offset":
            value.fill_(torch.nan if value.dtype.is_floating_point else FAR)


def poison_lists(lists: SparseStep, page_size: int) -> None:
    """What lies beyond a request's counts, of padding everything."""
    for b in range(lists.batch):
        pages = max(int(lists.page_count[b]), -(-int(lists.dense_count[b]) // page_size))
        lists.pages[b, pages:] = lists.segment_of_page[b, pages:] = FAR
        lists.segment_begin[b, int(lists.segment_count[b]) :] = FAR
        lists.base_slots[b, int(lists.base_count[b]) :] = FAR


def poison_flashinfer(engine: FlashInferAttend, lists: SparseStep) -> None:
    """What layers write before FlashInfer reads it, and whatever no list has."""
    buffers = engine._room
    assert buffers is not None
    for tensor in (buffers.queries, buffers.output, buffers.lse):
        tensor.fill_(torch.nan)
    heads = buffers.lse.shape[1]
    begins = buffers.indptr[: lists.batch * heads + 1].tolist()
    buffers.indices[begins[-1] :] = -1
    for pair in range(lists.batch * heads):
        b = pair // heads
        if lists.page_count[b] > 0:
            buffers.indices[begins[pair] + int(lists.base_count[b]) : begins[pair + 1]] = -1


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A module with one text of its source replaced by another."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is not once in {module.__name__}"
    path = folder / f"mutant_{module.__name__.replace('.', '_')}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = mutant
    spec.loader.exec_module(mutant)
    return mutant


@contextmanager
def expect_red() -> Iterator[None]:
    """What is checked in here must not hold."""
    try:
        yield
    except (AssertionError, IndexError):
        return
    pytest.fail("the mutant was not noticed")
