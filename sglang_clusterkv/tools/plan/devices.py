"""What of a GPU counts for a plan: its memory, as the driver reports it, and the bandwidth on its data sheet."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        memory_gb: GB (10^9 bytes) that the driver reports.
        tbs: TB/s of its memory on the data sheet.
        counted: kernels/instruction_counts.py has the machine code of its generation, and step_time.py its SMs and clock.
    """

    memory_gb: float
    tbs: float
    counted: bool = False


GPUS = {
    "A100-80G": Gpu(85.0, 2.04),
    "H100": Gpu(85.0, 3.35, counted=True),
    "H200": Gpu(150.0, 4.8, counted=True),
    "B200": Gpu(191.0, 8.0),
    "L40S": Gpu(47.7, 0.864),
    "RTX-4090": Gpu(25.3, 1.008),
}
REACHED = 0.9  # of the data sheet's bandwidth, by copies
MEMORY_SHARE = 0.88  # of the memory that SGLang gives to weights, KV cache and clusters
