"""Triton's launcher without a GPU: it runs up to the point where it would compile, and nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.kernel_scene import Clock


class NoGpu:
    """What Triton's launcher asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


class DryClock(Clock):
    """Runs a call once and takes no time; counts the launches that it would have made."""

    def __init__(self) -> None:
        self.launches = 0

    def ms(self, call: Callable[[], object], repeats: int) -> float:
        """See `Clock`; always NaN."""
        call()
        return float("nan")


def stop_before_launches(clock: DryClock) -> None:
    """From now on in this process kernels are bound to their arguments, counted, and neither compiled nor launched."""

    def hook(**_: Any) -> bool:
        clock.launches += 1
        return True

    triton.runtime.driver.set_active(NoGpu())
    triton.knobs.runtime.jit_cache_hook = hook
