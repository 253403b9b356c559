"""The scheduler of the installed FlashInfer, compiled for the host: what it plans, without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np

from tests.support.flashinfer_plan import PlanInfo

SOURCE = Path(__file__).with_suffix(".cpp")
# What the scheduler includes and a compiler for the host takes. Of pos_enc.cuh, which is of the device, it needs one name.
HEADERS = ("attention/scheduler.cuh", "attention/heap.h", "allocator.h", "exception.h", "utils.cuh")
POSITIONS = "#pragma once\nnamespace flashinfer { enum class PosEncodingMode { kNone = 0U }; }\n"
PARTIAL_BYTES = 1 << 40  # no more than addresses are taken of it


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    return Path(next(iter((found and found.submodule_search_locations) or ["."])))


DATA = _package("flashinfer") / "data"
INCLUDED = DATA / "include/flashinfer"
SEARCHED = (_package("triton") / "backends/nvidia/include", DATA / "cccl/libcudacxx/include")


def missing() -> str | None:
    """What it takes to compile and is not here; None: everything is."""
    if shutil.which("c++") is None:
        return "a compiler of C++"
    wanted = [*(INCLUDED / name for name in HEADERS), *SEARCHED]
    return next((f"{path}" for path in wanted if not path.exists()), None)


class Scheduler:
    """Makes plans.

    Args:
        folder: an empty one, to compile in.
    """

    def __init__(self, folder: Path) -> None:
        for name in HEADERS:
            copy = folder / "headers" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((INCLUDED / name).read_bytes())
        (folder / "headers/pos_enc.cuh").write_text(POSITIONS)
        library = folder / "scheduler.so"
        subprocess.run(
            ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-w", "-D__grid_constant__=",
             f"-I{folder / 'headers'}", *(f"-I{path}" for path in SEARCHED), str(SOURCE), "-o", str(library)],
            check=True,
        )  # fmt: skip
        self._plan = ctypes.CDLL(str(library)).plan

    def plan(
        self, lengths: np.ndarray, group: int, channels: int, graph: bool, sms: int, memory: np.ndarray
    ) -> PlanInfo:
        """As `flashinfer_plan.plan`, and its first result."""
        lists = len(lengths)
        queries, begins = np.arange(lists + 1, dtype=np.int32), np.zeros(lists + 1, np.int32)
        np.cumsum(lengths, out=begins[1:])
        info, staged = np.zeros(len(PlanInfo._fields), np.int64), memory.copy()

        def at(array: np.ndarray) -> ctypes.c_void_p:
            return ctypes.c_void_p(array.ctypes.data)

        failed = self._plan(
            at(queries), at(begins), ctypes.c_uint32(lists), ctypes.c_uint32(group), ctypes.c_uint32(channels), int(graph),
            sms, at(staged), at(memory), ctypes.c_size_t(len(memory)), at(staged), ctypes.c_size_t(PARTIAL_BYTES), at(info),
        )  # fmt: skip
        assert not failed, f"FlashInfer does not plan: {failed}"
        return PlanInfo(*info.tolist())
