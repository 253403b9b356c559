"""The threads of the CPU kernels, and how work is handed to them.

A kernel's work is items (a request and a kv head, a block of tokens), each computed alone, whichever thread takes it: so every
number of threads gives the same bits. The caller works too, and threads that sleep otherwise help it as soon as they are awake;
it returns when all items are done, and waits for nobody who has taken none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FunctionType
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import element_pointer, njit, part

_COUNT = ir.IntType(64)
_TAKEN, _DONE = 0, 1  # of a kernel's counter
_yield = types.ExternalFunction("sched_yield", types.int32())


class _Helpers:
    """Threads that wait for kernels to help with."""

    def __init__(self) -> None:
        self.chosen: int | None = None  # by `set_threads`
        self._queue: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self._started = 0
        os.register_at_fork(after_in_child=self._lost)

    def _lost(self) -> None:
        self._queue, self._started = SimpleQueue(), 0

    def _help(self) -> None:
        queue = self._queue
        while True:
            kernel, args = queue.get()
            kernel(*args)
            del args  # buffers that may be outgrown by now

    def call(self, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Let one of them call a kernel."""
        self._queue.put((kernel, args))

    def start(self, count: int) -> None:
        """Have so many."""
        while self._started < count:
            self._started += 1
            threading.Thread(target=self._help, name=f"clusterkv-{self._started}", daemon=True).start()


_helpers = _Helpers()


def set_threads(count: int | None) -> None:
    """Let the kernels of this process use so many threads; None: as many as torch does when they are called."""
    _helpers.chosen = count


def threads() -> int:
    """Threads that a kernel may use now."""
    return _helpers.chosen or torch.get_num_threads()


def run(kernel: Callable[..., None], items: int, *args: Any, most: int | None = None, stages: int = 3) -> None:
    """Call a kernel by as many threads as there may be.

    Args:
        kernel: takes the thread's number, a counter, how many items there are, and `args`.
        items: of work.
        most: threads, at most.
        stages: of the kernel, at most: each has two numbers of the counter.
    """
    count = min(threads(), items, most or items)
    # Of this call: who comes late finds nothing to do.
    counter = np.zeros(2 * stages, np.int64)
    _helpers.start(count - 1)
    for number in range(1, count):
        _helpers.call(kernel, (number, counter, items, *args))
    kernel(0, counter, items, *args)


@intrinsic
def _add(typing_context: Any, counter: Any, which: Any) -> Any:
    """counter[which] before one is added to it, atomically."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], args[0], [args[1]])
        return builder.atomic_rmw("add", pointer, _COUNT(1), "seq_cst")

    return types.int64(counter, types.intp), codegen


@intrinsic
def _read(typing_context: Any, counter: Any, which: Any) -> Any:
    """counter[which], atomically."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], args[0], [args[1]])
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(counter, types.intp), codegen


@part
def take(counter: Any) -> int:
    """The next item that nobody has taken; there may be no such item."""
    return _add(counter, _TAKEN)


@part
def done(counter: Any) -> None:
    """An item that was taken is done."""
    _add(counter, _DONE)


@part
def wait(counter: Any, items: int) -> None:
    """Until all items of a stage are done, which others need; those that are not were taken, by threads that run."""
    while _read(counter, _DONE) < items:
        _yield()


@part
def leave(number: int, counter: Any, items: int) -> None:
    """The caller's own thread, number 0, leaves a kernel when all items are done."""
    if number == 0:
        wait(counter, items)


def cached(kernel: Callable[..., None], constants: tuple[int, ...], **callees: Any) -> Callable[..., None]:
    """Compile a kernel that calls other compiled functions, and keep it on disk.

    numba finds it there by its file, name and closure; functions in a closure would have another identity in every process, so
    they are given as globals, and the name has the constants that they were made with.

    Args:
        kernel: a function whose closure has numbers only.
        constants: that tell it and the functions that it calls from others.
        callees: compiled functions, by the names that the kernel knows them by.
    """
    assert isinstance(kernel, FunctionType)
    made = FunctionType(
        kernel.__code__, kernel.__globals__ | callees, kernel.__name__, kernel.__defaults__, kernel.__closure__
    )
    made.__qualname__ = "_".join([kernel.__name__, *map(str, constants)])
    made.__module__ = kernel.__module__
    return njit(cache=True, nogil=True)(made)
