"""Triton's interpreter: which of the kernels that a process defines are interpreted.

Triton decides it when a kernel is defined, by TRITON_INTERPRET, and its own library (`tl.sum`, ...) is made of kernels too.
So the variable is set while Triton itself is imported and while our kernels are, and only then: SGLang's kernels stay what
they are, and servers that tests start do not inherit it.

The interpreter scans by functions of our own an element at a time, in Python. `scan_whole_arrays` has it do so by doubling, as
a GPU does: the function meets whole arrays, and must be associative.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_VARIABLE = "TRITON_INTERPRET"


@contextmanager
def interpreting(device: str) -> Iterator[None]:
    """Kernels defined in this block are interpreted if `device` is "cpu"."""
    if device != "cpu":
        yield
        return
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def scan_whole_arrays() -> None:
    """Once Triton was imported to be interpreted."""
    from triton.runtime.interpreter import ScanOps

    def scan(self: Any, tensors: list[Any]) -> list[Any]:
        found = [tensor.handle.data for tensor in tensors]
        place = np.indices(found[0].shape)[self.axis]
        step = 1
        while step < found[0].shape[self.axis]:
            both = [
                self.to_tensor(x, tensor.dtype)
                for arrays in ([np.roll(x, step, self.axis) for x in found], found)
                for x, tensor in zip(arrays, tensors, strict=True)
            ]
            joined = self.combine_fn.fn(*both)
            joined = joined if isinstance(joined, tuple) else (joined,)
            found = [np.where(place < step, x, y.handle.data) for x, y in zip(found, joined, strict=True)]
            step *= 2
        return [self.to_tensor(x, tensor.dtype) for x, tensor in zip(found, tensors, strict=True)]

    ScanOps.generic_scan = scan
