"""A plugin of SGLang that loses a page of the KV pool when told to: shows that the strict idle check would notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TRIGGER = "lose-a-page"


def lose_a_page(folder: Path) -> None:
    """The next pages that are freed are one fewer."""
    (folder / _TRIGGER).touch()


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids"
    HookRegistry.register(target, _release, HookType.AROUND)


def _release(original: Any, allocator: Any, *page_ids: Any) -> Any:
    trigger = Path(__file__).parent / _TRIGGER
    if trigger.exists():
        trigger.unlink()
        page_ids = (page_ids[0][1:], *page_ids[1:])
    return original(allocator, *page_ids)
