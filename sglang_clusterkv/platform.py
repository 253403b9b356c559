"""The platform under which SGLang serves without an accelerator, and its thread settings.

SGLang's own CPU platform needs a build of sgl_kernel for the CPU, which the usual wheel is not. `activate` answers only
where no accelerator is found; everywhere else SGLang's own platform stays in charge.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

OMP_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
# A torch operation at decode takes less time than a thread barrier on a shared machine.
CORES_PER_RANK = 1


def activate() -> str | None:
    """The platform's dotted path where no accelerator is found, else None (SGLang's entry point for platforms)."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None  # the user asks for SGLang's own CPU platform
    return None if accelerator_found() else f"{__name__}.ClusterKVCpuPlatform"


def accelerator_found() -> bool:
    """Whether torch can use any device but the CPU."""
    if torch.accelerator.is_available():
        return True
    modules = [getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "hpu", "musa", "mps")]
    return any(module is not None and module.is_available() for module in modules)


def default_omp_binding(cores: Sequence[int], tp_size: int) -> str:
    """Cores of each rank as SGLang writes them, ranks separated by `|`: "0|1" for two ranks on cores 0 and 1.

    cores: the ids that this process may use. Ranks share cores only when there are fewer cores than ranks.
    """
    per_rank = max(1, min(CORES_PER_RANK, len(cores) // tp_size))
    groups = [[cores[(rank * per_rank + i) % len(cores)] for i in range(per_rank)] for rank in range(tp_size)]
    return "|".join(",".join(map(str, group)) for group in groups)


def thread_count(binding: str, rank: int) -> int | None:
    """How many threads a rank has under a binding such as "0-3|4-7"; None where it names no cores for the rank."""
    groups = binding.split("|")
    if rank >= len(groups):
        return None
    count = 0
    for part in groups[rank].split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            return None
        count += int(last or first) - int(first) + 1
    return count


def apply_thread_count(rank: int) -> None:
    """Give this scheduler process as many torch threads as its binding has cores; OMP_NUM_THREADS stands above it.

    SGLang applies the binding with sgl_kernel's AMX and ARM builds only.
    """
    threads = thread_count(os.environ.get(OMP_BINDING, ""), rank)
    if threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


class ClusterKVCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on the CPU with torch's own kernels."""

    _enum = PlatformEnum.OOT
    # What this process wrote into OMP_BINDING: a later engine of the same process may have another tp_size.
    _written_binding: str | None = None

    def get_device(self, device_id: int = 0) -> str:
        """A string, not a torch.device: SGLang splits it at the colon when --device is left out."""
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Bind each rank's threads unless the user did; the ranks, started later, inherit it by the environment."""
        if os.environ.get(OMP_BINDING) in (None, "", self._written_binding):
            ranks = server_args.dp_size * server_args.tp_size * server_args.pp_size
            binding = default_omp_binding(sorted(os.sched_getaffinity(0)), ranks)
            os.environ[OMP_BINDING] = ClusterKVCpuPlatform._written_binding = binding

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Our KV pool when this process serves with clusterkv, else what SGLang would take."""
        from sglang_clusterkv.plugin import kv_pool_cls

        return kv_pool_cls(super().get_kv_pool_cls(kind=kind), kind)

    def get_paged_allocator_cls(self) -> type | None:
        """Our allocator when this process serves with clusterkv, else what SGLang would take."""
        from sglang_clusterkv.plugin import paged_allocator_cls

        return paged_allocator_cls(super().get_paged_allocator_cls())
