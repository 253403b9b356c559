"""Where SGLang's ids of slots become places in the pool's buffers: in what a forward writes.

With a host tier a slot's page may be anywhere, so SGLang's ids (req_to_token, the radix tree, the allocator) are logical.
SGLang translates the ids that a forward writes once, when it makes its batch; what of ours reads keys and values resolves
logical ids itself, through the tier, and SGLang's own backends are told where they find a prefix (tier_prefill.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.kv_loc_plan import IdSpace, IdSpaceKind
from sglang.srt.runtime_context import get_schedule

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_loc_plan import KVLocPlan
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_clusterkv.memory.directory import Directory


class TierTranslator(KVIndexTranslator):
    """Translates what is written to device slots, and what SGLang's own backends read while they are told where that lies.

    Args:
        directory: of the pool's tier.
        arguments: of SGLang's translator.
    """

    def __init__(self, directory: Directory, **arguments: Any) -> None:
        super().__init__(**arguments)
        plain = self._spaces[IdSpaceKind.FULL]
        assert plain.write is None and plain.read_v2p is None, "SGLang translates this pool's ids itself"
        key = (IdSpaceKind.FULL, id(directory))
        self._logical = IdSpace(key=key, write=directory.translate)
        self._on_device = IdSpace(key=key, write=directory.translate, read_v2p=directory.device_page)
        self._spaces[IdSpaceKind.FULL] = self._logical
        self._begins: torch.Tensor | None = None

    @contextmanager
    def reads_of_device(self) -> Iterator[None]:
        """Backends that ask in here read device slots: all that they read is on the device."""
        self._spaces[IdSpaceKind.FULL] = self._on_device
        try:
            yield
        finally:
            self._spaces[IdSpaceKind.FULL] = self._logical

    @contextmanager
    def reads_of_workspace(self, begins: torch.Tensor) -> Iterator[None]:
        """Backends that ask in here read places in a workspace that has the prefixes of a batch.

        Args:
            begins: int64 [B], where each request's begins in it.
        """
        self._begins = begins
        try:
            yield
        finally:
            self._begins = None

    def pack_read_stream(
        self,
        plan: KVLocPlan,
        *,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        indptr: torch.Tensor,
        out: torch.Tensor,
        kv_start_idx: torch.Tensor | None = None,
        **rest: Any,
    ) -> bool:
        """Fill `out` with what a backend reads, request after request, from `indptr` on; whether that needs no translation."""
        if self._begins is None:
            told: bool = super().pack_read_stream(
                plan,
                req_pool_indices=req_pool_indices,
                seq_lens=seq_lens,
                indptr=indptr,
                out=out,
                kv_start_idx=kv_start_idx,
                **rest,
            )
            return told
        requests = seq_lens.numel()
        first = self._begins[:requests] - indptr[:requests]
        if kv_start_idx is not None:
            first = first + kv_start_idx[:requests]
        places = torch.arange(out.numel(), device=out.device)
        # What is behind the last request's end is nobody's: SGLang makes `out` longer than what it reads of it.
        of = torch.searchsorted(indptr[1 : requests + 1].long(), places, right=True).clamp_(max=requests - 1)
        out.copy_(places + first[of])
        return True


def install(runner: ModelRunner) -> None:
    """Make the host tier of a runner's pool, and translate what is written to it (AFTER init_kv_index_translator).

    The sizes of both are known by then, and no attention backend has been made.
    """
    pool, arguments = runner.token_to_kv_pool, runner.server_args
    ranks = max(1, arguments.tp_size * arguments.dp_size // arguments.nnodes)
    tier = pool.make_tier(get_schedule().chunked_prefill_size, runner.max_running_requests, ranks)
    if runner.device != "cpu":
        runner.token_to_kv_pool_allocator.admission.most_prefix_tokens = runner.model_config.context_len
    runner.kv_index_translator = TierTranslator(
        tier.directory,
        req_to_token=runner.req_to_token_pool.req_to_token,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        token_to_kv_pool=pool,
        page_size=runner.page_size or 1,
        device=runner.device,
        is_draft_worker=runner.is_draft_worker,
    )
