"""Triton's interpreter: which of the kernels that a process defines are interpreted.

Triton decides it when a kernel is defined, by TRITON_INTERPRET, and its own library (`tl.sum`, ...) is made of kernels too.
So the variable is set while Triton itself is imported and while our kernels are, and only then: SGLang's kernels stay what
they are, and servers that tests start do not inherit it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
