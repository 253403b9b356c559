"""What a prefill pass may take while a host tier's ring is short, which it is after a refill that failed.

Requests then wait in the queue and decode goes on. All ranks have to admit the same, though a refill may fail on one of them
alone: so they agree, in every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang.srt.runtime_context import get_parallel

from sglang_clusterkv.clusters.backoff import BackOff


class WaitingBudget(PrefillBudget):
    """Admits nothing in this pass: requests stay in the queue, and a chunk under way is left as it is. Decode goes on."""

    def check_prefill(self, **kwargs: Any) -> tuple[bool, int | None]:
        return False, None

    def can_allocate_prefill(self, **kwargs: Any) -> bool:
        return False

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        return None


class PrefixBudget(PrefillBudget):
    """Admits as many requests as one workspace holds the prefixes of (tier_prefill.py); one fits in any case.

    Args:
        admission: told where a request has to wait for the next pass.
        arguments: of SGLang's budget.
    """

    def __init__(self, admission: Admission, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert admission.most_prefix_tokens is not None
        self._admission, self._most = admission, admission.most_prefix_tokens
        self._taken = self._asked = 0

    def check_prefill(self, *, extend_input_len: int, input_tokens: int, **asked: Any) -> tuple[bool, int | None]:
        self._asked = input_tokens - extend_input_len
        if self._asked and self._taken and self._taken + self._asked > self._most:
            self._admission.waits = True
            return False, None
        answer: tuple[bool, int | None] = super().check_prefill(
            extend_input_len=extend_input_len, input_tokens=input_tokens, **asked
        )
        return answer

    def reserve(self, *arguments: Any, is_chunked_continuation: bool = False, **named: Any) -> None:
        super().reserve(*arguments, is_chunked_continuation=is_chunked_continuation, **named)
        # What a chunk that goes on has before it was not asked for: it may be all that fits.
        self._taken += self._most if is_chunked_continuation else self._asked


class Admission:
    """Whether prefill passes of a pool with a host tier may take anything.

    Args:
        pool: a ClusterKVPool, which has no engine yet.

    Attributes:
        waits: the last pass was told to take nothing, or less than it had.
        most_prefix_tokens: of the requests of a batch together, where they are gathered in one place: those of the longest
            request. None: they are read where they are.
    """

    def __init__(self, pool: Any) -> None:
        self.waits = False
        self.most_prefix_tokens: int | None = None
        self._pool = pool
        self._refills = BackOff()

    def begin_pass(self) -> bool:
        """A prefill pass begins; whether it may take anything. Waits for the other ranks, which call this as well."""
        self.waits = not least_of_ranks(self._ring_is_full())
        return not self.waits

    def _ring_is_full(self) -> bool:
        """Whether it is, as it is but after a failed refill; one is tried here too.

        With nothing running there is no forward, and no head that would try it. Passes are counted, not time. Only heads and
        this fill the ring, and nothing was allocated since the last head.
        """
        pool = self._pool
        assert pool.tier is not None
        if pool.engine is None or pool.tier.directory.ring_level == pool.tier.directory.ring_pages:
            return True
        self._refills.launch += 1
        if not self._refills.over:
            return False
        with pool.engine.stream.between_forwards():
            filled: bool = pool.engine.residency.refill()
        self._refills.succeeded() if filled else self._refills.failed()
        return filled


def least_of_ranks(number: int) -> int:
    """The least that a tensor-parallel rank says; waits for all of them."""
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return number
    least = torch.tensor([number], dtype=torch.int64)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=parallel.tp_group.cpu_group)
    return int(least)


def ask_again(scheduler: Any) -> None:
    """A round of the scheduler begins: after a pass that had to wait the next one asks once more.

    Where something runs, SGLang takes such a pass for a full batch, and asks no more until a request leaves it.
    """
    if scheduler.token_to_kv_pool_allocator.admission.waits:
        scheduler.running_batch.batch_is_full = False
