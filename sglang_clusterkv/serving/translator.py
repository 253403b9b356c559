"""Where SGLang's ids of slots become places in the pool's buffers: in what a forward writes, and nowhere else.

With a host tier a slot's page may be anywhere, so SGLang's ids (req_to_token, the radix tree, the allocator) are logical.
SGLang translates the ids that a forward writes once, when it makes its batch; what reads keys and values resolves logical ids
itself, through the tier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.kv_loc_plan import IdSpace, IdSpaceKind
from sglang.srt.runtime_context import get_schedule

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_clusterkv.memory.directory import Directory


class TierTranslator(KVIndexTranslator):
    """Translates what is written to device slots.

    Args:
        directory: of the pool's tier.
        arguments: of SGLang's translator.
    """

    def __init__(self, directory: Directory, **arguments: Any) -> None:
        super().__init__(**arguments)
        plain = self._spaces[IdSpaceKind.FULL]
        assert plain.write is None and plain.read_v2p is None, "SGLang translates this pool's ids itself"
        self._spaces[IdSpaceKind.FULL] = IdSpace(key=(IdSpaceKind.FULL, id(directory)), write=directory.translate)


def install(runner: ModelRunner) -> None:
    """Make the host tier of a runner's pool, and translate what is written to it (AFTER init_kv_index_translator).

    The sizes of both are known by then, and no attention backend has been made.
    """
    pool, arguments = runner.token_to_kv_pool, runner.server_args
    ranks = max(1, arguments.tp_size * arguments.dp_size // arguments.nnodes)
    tier = pool.make_tier(get_schedule().chunked_prefill_size, runner.max_running_requests, ranks)
    runner.kv_index_translator = TierTranslator(
        tier.directory,
        req_to_token=runner.req_to_token_pool.req_to_token,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        token_to_kv_pool=pool,
        page_size=runner.page_size or 1,
        device=runner.device,
        is_draft_worker=runner.is_draft_worker,
    )
