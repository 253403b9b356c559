"""Huge pages for arrays of which a step reads rows that lie apart: a page's address is looked up for nearly every row."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterable

import torch

logger = logging.getLogger(__name__)
_HUGE = 2 << 20  # bytes
_COLLAPSE = 25  # Linux's MADV_COLLAPSE, which Python has no name for


def use_huge_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Let whole huge pages inside of these arrays, contiguous and on the CPU, be such; what they hold stays.

    Where the system has none to give, or is not Linux, nothing changes.

    Returns:
        How many bytes were made so, at once.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return 0
    library, made = ctypes.CDLL(None), 0
    for tensor in tensors:
        begin = -(-tensor.data_ptr() // _HUGE) * _HUGE
        end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _HUGE * _HUGE
        if end > begin:
            where = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
            # Later, by the kernel's own thread, and now: an old kernel knows only the former.
            library.madvise(*where, advice)
            if library.madvise(*where, _COLLAPSE) == 0:
                made += end - begin
    logger.debug("%d bytes in huge pages", made)
    return made
