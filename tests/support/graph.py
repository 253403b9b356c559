"""A decode graph without a GPU: what a capture launches, with the numbers and addresses of the capture, run again and again.

As with CUDA's graphs, a replay runs no Python of ours: a launch has the grid, the integers and the tensors that it had when it
was captured, and only what lies in these tensors may change. A capture ends with an AssertionError at every operation of torch
that computes, copies or waits; it may allocate, as graphs do from a pool of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_clusterkv.kernels.merge.triton import merge_kernel
from sglang_clusterkv.kernels.workspace import Workspace
from sglang_clusterkv.memory.step import SparseStep

FAR = 1 << 30


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
        kind = type(merge_kernel)
        self._run = run = kind.run
        capture = Capture()
        with monkeypatch.context() as patched, capture:
            patched.setattr(kind, "run", lambda kernel, *of, **named: capture.note(run, kernel, of, named))
            self.output = call()
        self._launches = capture.launches

    def replay(self) -> torch.Tensor:
        """The same launches again."""
        self.output.fill_(torch.nan)
        for kernel, arguments, named in self._launches:
            self._run(kernel, *arguments, **named)
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


@contextmanager
def expect_red() -> Iterator[None]:
    """What is checked in here must not hold."""
    try:
        yield
    except (AssertionError, IndexError):
        return
    pytest.fail("the mutant was not noticed")
