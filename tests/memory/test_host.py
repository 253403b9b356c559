"""Host rows for a GPU are page-locked, and no page of the system is locked twice.

Red when: memory that a GPU's kernels will read is not registered with CUDA, parts of it share a page, what is registered
stays so after its rows are gone or after one of them failed, or the failure's sentence names no setting.
"""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.memory.host import HOST_DTYPES, HostRows

LAYERS = 3


class Cudart:
    """What CUDA's runtime keeps of registered memory; the `fails`-th registration fails."""

    def __init__(self, fails: int = 0) -> None:
        self.held: dict[int, int] = {}
        self._fails = fails

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self._fails -= 1
        assert flags == 0 and size > 0
        if self._fails == 0:
            return 2
        self.held[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.held[address]
        return 0


def rows_of(host_dtype: str, device: str) -> HostRows:
    """Of an odd number of pages, so that a layer's rows end anywhere."""
    return HostRows(LAYERS, 3, 48, 16, 37, torch.float16, host_dtype, device)


@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
def test_rows_for_a_gpu_are_locked_by_whole_pages_until_they_are_gone(
    host_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    host = rows_of(host_dtype, "cuda")
    assert len(cudart.held) == LAYERS
    for address, size in cudart.held.items():
        assert address % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0 and size == host.layer_bytes
    for layer, rows in enumerate(host.rows):
        begin = rows.data_ptr()
        assert begin == host.rows[0].data_ptr() + layer * host.layer_bytes, "kernels find layers by their distance"
        assert begin + rows.numel() <= begin + cudart.held[begin]
        assert rows.is_contiguous() and not rows[0].any()
    del host, rows
    gc.collect()
    assert not cudart.held


def test_rows_on_a_cpu_are_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    host = rows_of("auto", "cpu")
    assert not cudart.held and len(host.rows) == LAYERS


def test_memory_that_cannot_be_locked_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(fails=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(ConfigError, match=r"could not be page-locked .* --max-total-tokens"):
        rows_of("int8", "cuda")
    assert not cudart.held
