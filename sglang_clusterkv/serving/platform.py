"""When our CPU platform is used, and how many threads each rank gets there.

SGLang's own CPU platform needs a build of sgl_kernel for the CPU, which the usual wheel is not. `activate` answers only
where no accelerator is found; everywhere else SGLang's own platform stays in charge. No sglang import here: SGLang
calls `activate` while it is being imported.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

OMP_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
OVERLAP = "SGLANG_CLUSTERKV_CPU_OVERLAP"  # 1: SGLang's overlap schedule on our CPU platform
SLEEP = "SGLANG_CLUSTERKV_CPU_SLEEP"  # 0: a scheduler there that has nothing to do stays awake
BF16_WEIGHTS = "SGLANG_CLUSTERKV_CPU_BF16_WEIGHTS"  # 0: no copies of weights in bf16 there
LAYERS = "SGLANG_CLUSTERKV_CPU_LAYERS"  # 0: decoder layers run by SGLang's modules in every step
# A torch operation at decode takes less time than a thread barrier on a shared machine.
CORES_PER_RANK = 1


def activate() -> str | None:
    """The platform's dotted path where no accelerator is found, else None (SGLang's entry point for platforms)."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None  # the user asks for SGLang's own CPU platform
    return None if accelerator_found() else "sglang_clusterkv.serving.cpu_platform.ClusterKVCpuPlatform"


def is_our_platform(platform: Any) -> bool:
    """Whether SGLang's current platform is the one that `activate` names."""
    return type(platform).__module__ == "sglang_clusterkv.serving.cpu_platform"


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


def prefill_threads(cores: int, ranks: int, decode_threads: int) -> int:
    """Torch threads for a prefill of many tokens: this rank's share of the cores, where a decode step has one thread.

    Large products gain from every core; a decode step's small ones lose more to barriers than they gain. OMP_NUM_THREADS,
    or a binding to more than one core, stands for both.
    """
    if "OMP_NUM_THREADS" in os.environ or decode_threads > 1:
        return decode_threads
    return max(1, cores // ranks)
