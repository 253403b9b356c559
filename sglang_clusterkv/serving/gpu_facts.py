"""What of this machine's GPU matters to clusterkv: for `sglang-clusterkv check`, before a server is started.

A probe that fails is a line of the report, not an error of the command.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sglang_clusterkv.config import ClusterKVConfig

_PAGE_SIZE = 16
_LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled and read for; older GPUs have no bf16


def report() -> dict[str, Any]:
    """JSON-able facts of the first GPU: its name and size, what prefills, and what may attend; or why there is none."""
    import torch

    if torch.version.hip is not None:
        return {"found": False, "why": "AMD GPUs are not served"}
    if not torch.cuda.is_available():
        return {"found": False, "why": "torch finds no CUDA device"}
    facts: dict[str, Any] = {"found": True, "torch": torch.__version__, "cuda": torch.version.cuda}
    for name, probe in (("device", _device), ("prefill", _prefill), ("attend", _attend), ("decode_graphs", _graphs)):
        try:
            facts[name] = probe()
        except Exception as error:
            facts[name] = f"not known ({type(error).__name__}: {error})"
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """The report as text."""
    if not facts["found"]:
        return [f"GPU: none ({facts['why']}); servers run on the CPU"]
    device = facts["device"]
    if isinstance(device, dict):
        said = "{name}, compute capability {capability}, {sms} SMs, {gigabytes} GB".format_map(device)
        device = said + (f": {device['not_served']}" if device["not_served"] else "")
    found = [f"GPU: {device}; torch {facts['torch']}, CUDA {facts['cuda']}"]
    for name, title in (("prefill", "prefill"), ("attend", "attend_engine")):
        value = facts[name]
        if isinstance(value, dict):
            value = "; ".join(f"{one} {'runs' if why is None else why}" for one, why in value.items())
        found.append(f"{title}: {value}")
    return [*found, f"decode graphs: {facts['decode_graphs']}"]


def _device() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    too_old = capability < _LEAST_CAPABILITY
    return {
        "name": properties.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "sms": properties.multi_processor_count,
        "gigabytes": round(properties.total_memory / 1e9),
        "not_served": "the kernels need 8.0 or newer" if too_old else None,
    }


def _prefill() -> dict[str, str | None]:
    """Why each backend does not prefill here, by name; None: it does."""
    from sglang_clusterkv.serving import prefill_backend

    config = ClusterKVConfig()
    return {name: prefill_backend.unusable(name, config, _PAGE_SIZE, sinks=False) for name in prefill_backend.NAMES}


def _attend() -> dict[str, str | None]:
    """Likewise of what attends to recalled tokens, for heads of 128 in bf16."""
    import torch

    from sglang_clusterkv.kernels.attend.flashinfer import why_not

    why = why_not(ClusterKVConfig(), 8, 128, torch.bfloat16, 1 << 20)
    return {"triton": None, "flashinfer": why or _no_kernels()}


def _no_kernels() -> str | None:
    """Why FlashInfer has no kernels for this GPU and nothing to compile them with; None: it has one of the two."""
    from flashinfer.jit import env

    if any(Path(env.FLASHINFER_AOT_DIR).glob("batch_prefill*/*.so")):
        return None
    return None if _compiler() else "its kernels are not compiled and there is no nvcc"


def _compiler() -> bool:
    """Whether CUDA's compiler is here."""
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


def _graphs() -> str:
    return "on, but for a host tier and traces"
