"""Notices where torch would wait for a device, on a machine that has none."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Raises AssertionError where a number is asked for, or how many of something there are."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = args[1] if str(func).startswith(("aten.index.", "aten.index_put")) else ()
        masks = [place for place in places if place is not None and place.dtype is torch.bool]
        if masks or str(func).startswith(self.NAMES):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
