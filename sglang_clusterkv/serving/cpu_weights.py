"""Copies of a model's weights in half the bytes, which a decode step's products read on our CPU platform.

A copy is read while nothing can have changed its weights since they were looked at. SGLang changes weights when a request tells
it to, so after any request that is not known to leave them alone each copy is made anew before it is read. So it is where the
layer's tensor is another, has another shape or was written to under PyTorch's eyes. While SGLang loads weights into a layer,
none is read.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from sglang_clusterkv.kernels.products_cpu import halve
from sglang_clusterkv.memory.huge_pages import use_huge_pages
from sglang_clusterkv.serving.platform import BF16_WEIGHTS

logger = logging.getLogger(__name__)

MOST_OF_MEMORY = 0.25  # of what is free, for copies
# All types of requests to a scheduler (SGLang 0.5.23), by name. Those that change no weights of a layer:
LEAVE_WEIGHTS = {
    # prompts, health checks among them, and their end
    "TokenizedGenerateReqInput", "BatchTokenizedGenerateReqInput", "TokenizedEmbeddingReqInput",
    "BatchTokenizedEmbeddingReqInput", "AbortReq",
    # caches of KV and of tokens
    "FlushCacheReqInput", "ClearHiCacheReqInput", "AttachHiCacheStorageReqInput", "DetachHiCacheStorageReqInput",
    "GetHiCacheL3LayoutReq", "OpenSessionReqInput", "CloseSessionReqInput", "AddExternalCorpusReqInput",
    "RemoveExternalCorpusReqInput", "ListExternalCorporaReqInput",
    # weights are read and sent, or nothing changes but the group that sends them, or the name of their version
    "GetWeightsByNameReqInput", "SendWeightsToRemoteInstanceReqInput", "InitWeightsSendGroupForRemoteInstanceReqInput",
    "InitWeightsUpdateGroupReqInput", "DestroyWeightsUpdateGroupReqInput", "UpdateWeightVersionReqInput",
    # an adapter is kept beside the weights
    "LoadLoRAAdapterReqInput", "LoadLoRAAdapterFromTensorsReqInput", "UnloadLoRAAdapterReqInput",
    # what is told, counted and logged; settings of speculation and pipelines
    "GetInternalStateReq", "SetInternalStateReq", "ProfileReq", "ExpertDistributionReq", "ConfigureLoggingReq",
    "DumperControlReqInput",
    # when and how the scheduler runs
    "SlowDownReqInput", "FreezeGCReq", "ShutdownReq", "PauseGenerationReqInput", "PdRoleSwitchReqInput",
}  # fmt: skip
CHANGE_WEIGHTS = {
    "UpdateWeightFromDiskReqInput", "UpdateWeightsFromDistributedReqInput", "UpdateWeightsFromTensorReqInput",
    "UpdateWeightsFromIPCReqInput", "BeginWeightUpdateReqInput", "EndWeightUpdateReqInput",
    # their memory is given away and comes back
    "ReleaseMemoryOccupationReqInput", "ResumeMemoryOccupationReqInput",
    # weights at random, among others; any method by its name; experts that move
    "CheckWeightsReqInput", "RpcReqInput", "ScaleElasticEPReqInput",
    # others may have written to them during the pause
    "ContinueGenerationReqInput",
}  # fmt: skip

unknown: Counter[str] = Counter()  # requests of types that are in neither list, by name
_changes = 0  # requests that may have changed weights


def requests_came(received: Iterable[Any]) -> None:
    """A scheduler is about to do what these ask for; what is not known may change weights, and is said once."""
    global _changes
    names = [type(request).__name__ for request in received]
    for name in names:
        if name in LEAVE_WEIGHTS:
            continue
        _changes += 1
        if name not in CHANGE_WEIGHTS:
            unknown[name] += 1
            if unknown[name] == 1:
                logger.info(
                    "clusterkv: %s may change weights for all that is known: copies in bf16 are made anew", name
                )


def in_memory(*tensors: torch.Tensor) -> bool:
    """Whether these are float32 numbers one behind the other, in this process's memory at their address.

    Tensors of a meta device, and those that are made of others (quantised, distributed), say that they are float32 too.
    """
    for t in tensors:
        if t.dtype is not torch.float32 or not t.is_cpu or not t.is_contiguous() or t.data_ptr() == 0:
            return False
    return True


class Halves:
    """The upper halves of a layer's weights, where the lower ones are all zero.

    Args:
        weight: float32 [N, D], contiguous, as it is served now.
        room: int32 [N * D / 2] or more, of which the copy takes the first.
    """

    def __init__(self, weight: torch.Tensor, room: torch.Tensor) -> None:
        rows, channels = weight.shape
        self._loading = False
        self._copy = room[: rows * (channels // 2)].view(rows, channels // 2)
        self._fits = False
        self._seen: tuple[Any, ...] = ()
        self._weight = weakref.ref(weight)  # another one may lie where it was
        self.of(weight)

    @property
    def nbytes(self) -> int:
        """Of the copy."""
        return self._copy.nbytes

    def loading(self, now: bool) -> None:
        """Whether the weights are being loaded."""
        self._loading = now
        self._seen = ()

    def of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The copy, of the weights as they are now; None where they do not fit or are being loaded."""
        version = 0 if weight.is_inference() else weight._version
        seen = (weight.data_ptr(), weight.shape, version, _changes)
        if seen != self._seen or self._weight() is not weight:
            self._look(weight)
            self._seen, self._weight = seen, weakref.ref(weight)
        return self._copy if self._fits else None

    def _look(self, weight: torch.Tensor) -> None:
        halved = (len(weight), weight.shape[1] // 2) if weight.dim() == 2 else ()
        may = not self._loading and self._copy.shape == halved and in_memory(weight)
        self._fits = may and halve(weight, self._copy)


def copies_of(weights: dict[str, torch.Tensor], ranks: int = 1) -> dict[str, Halves]:
    """Copies of a model's weights, as far as they fit; none where the user or memory does not want them. Says so in the log.

    Args:
        weights: by name; any dtype.
        ranks: processes on this machine that make as large ones.
    """
    if os.environ.get(BF16_WEIGHTS) == "0":
        return {}
    layers = len(weights)
    weights = {name: weight for name, weight in weights.items() if _may_fit(weight)}
    if not weights:
        return {}
    wanted = sum(weight.nbytes for weight in weights.values()) // 2
    free = psutil.virtual_memory().available
    if ranks * wanted > MOST_OF_MEMORY * free:
        logger.info(
            "clusterkv: weights are read in float32: copies in bf16 would take %d MB, more than a quarter of the %d MB free",
            ranks * wanted // 10**6,
            free // 10**6,
        )
        return {}
    copies, room = {}, torch.empty(wanted // 4, dtype=torch.int32)
    use_huge_pages([room])
    for name, weight in weights.items():
        copy = Halves(weight, room)
        if copy.of(weight) is not None:  # else for good: memory is taken before the KV pool is sized
            copies[name], room = copy, room[copy.nbytes // 4 :]
    if copies:
        logger.info(
            "clusterkv: decode steps read the weights of %d of %d layers from copies in bf16, which take %d MB; the "
            "same numbers to the bit (%s=0: none)",
            len(copies),
            layers,
            sum(copy.nbytes for copy in copies.values()) // 10**6,
            BF16_WEIGHTS,
        )
    return copies


def _may_fit(weight: torch.Tensor) -> bool:
    """Whether bf16 holds a layer's first row, so that no memory is taken for a checkpoint of another type."""
    if weight.dim() != 2 or not in_memory(weight):
        return False
    return halve(weight[:1], torch.empty(1, weight.shape[1] // 2, dtype=torch.int32))
