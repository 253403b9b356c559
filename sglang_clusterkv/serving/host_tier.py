"""Sizes of the host tier, asked while SGLang sizes its pools: pages on the device, bytes of a token, requests that fit.

SGLang counts *logical* pages throughout, as many as the host tier has rows; the pool's buffers have room for fewer.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.memory.host import host_row_bytes
from sglang_clusterkv.memory.tier import least_device_pages
from sglang_clusterkv.serving.admission import least_of_ranks

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def is_on(config: ClusterKVConfig | None) -> bool:
    """Whether a process with this configuration has a host tier."""
    return config is not None and config.host_ratio > 1


def device_pages(config: ClusterKVConfig, pages: int) -> int:
    """Pages of the pool's buffers, of a KV cache of so many logical pages; the padding page counts in neither."""
    return math.ceil(pages / config.host_ratio)


def bytes_per_token(
    config: ClusterKVConfig,
    *,
    device_type: str,
    device: int,
    kv_heads: int,
    layers: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of the device's memory that keys and values take per logical token, over a rank's layers and kv heads, rounded up.

    On a CPU both tiers are the same memory, so host rows count there. On a GPU they do not: `check_memory` asks for them.

    Args:
        config: with a tier.
        device_type: of the pool, "cpu" or "cuda".
        device: bytes of a token that is on the device.
        kv_heads: of this rank.
        layers: likewise.
        head_dim: channels of a head.
        dtype: of the KV pool.
    """
    host = layers * kv_heads * host_row_bytes(head_dim, dtype, config.host_kv_dtype) if device_type == "cpu" else 0
    return math.ceil(device / config.host_ratio) + host


def rows_that_fit(config: ClusterKVConfig, *, tokens: int, chunk_tokens: int, page_size: int, rows: int) -> int:
    """The most requests, up to `rows`, that a KV cache of so many logical tokens serves at once.

    Raises ConfigError where it is none, with the numbers that fit.
    """
    pages = device_pages(config, tokens // page_size)
    if least_device_pages(config, chunk_tokens=chunk_tokens, max_rows=1, page_size=page_size) > pages:
        raise ConfigError(_too_small(config, pages, tokens, chunk_tokens, page_size))
    low, high = 1, max(1, rows)
    while low < high:  # the pages that are needed rise with the rows
        middle = (low + high + 1) // 2
        fits = least_device_pages(config, chunk_tokens=chunk_tokens, max_rows=middle, page_size=page_size) <= pages
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def limit_rows(config: ClusterKVConfig, rows: int, tokens: int) -> int:
    """The most running requests, of those that SGLang came to for a KV cache of so many logical tokens.

    Raises ConfigError where the device tier holds not even one and its chunk.
    """
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    fit = rows_that_fit(
        config, tokens=tokens, chunk_tokens=schedule.chunked_prefill_size, page_size=schedule.page_size, rows=rows
    )
    if fit < rows:
        log = logger.info if schedule.max_running_requests is None else logger.warning
        log(
            "clusterkv: %d requests run at once instead of %d: the windows of more do not fit the %d tokens that "
            "host_ratio=%g leaves on the device",
            fit, rows, device_pages(config, tokens // schedule.page_size) * schedule.page_size, config.host_ratio,
        )  # fmt: skip
    return fit


def check_chunks(chunk_tokens: int | None) -> None:
    """Raise ConfigError where SGLang takes prompts in one piece after all."""
    if chunk_tokens is None:
        raise ConfigError(
            "SGLang takes this model's prompts in one piece, as it does with multimodal models in the implementation of "
            "Transformers, and a host tier needs chunks that fit the device: leave out host_ratio, or --model-impl transformers"
        )


def _too_small(config: ClusterKVConfig, pages: int, tokens: int, chunk_tokens: int, page_size: int) -> str:
    """The sentence for a device tier that holds no request and its chunk."""
    least = least_device_pages(config, chunk_tokens=chunk_tokens, max_rows=1, page_size=page_size)
    # Up to here the device tier is ceil(pages / ratio) = least pages.
    enough = (math.floor((least - 1) * config.host_ratio) + 1) * page_size
    ratio = math.floor(100 * (tokens // page_size) / least) / 100
    fixes = [f"raise --max-total-tokens to {enough} (it counts the tokens of both tiers)"]
    chunk = chunk_tokens - page_size * math.ceil((least - pages) / 2)
    if chunk >= page_size and least_device_pages(config, chunk_tokens=chunk, max_rows=1, page_size=page_size) <= pages:
        fixes.append(f"lower --chunked-prefill-size to {chunk // page_size * page_size}")
    if ratio > 1:
        fixes.append(f"lower host_ratio to {ratio:g}")
    return (
        f"host_ratio={config.host_ratio:g} leaves {pages * page_size} of {tokens} tokens on the device, where one request and "
        f"its chunks of {chunk_tokens} need {least * page_size}: {', or '.join(fixes)}"
    )


def check_memory(config: ClusterKVConfig, *, tokens: int, host: int, others: int, ranks: int) -> None:
    """Raise ConfigError where the machine has no room for the host rows, with the number of tokens that fits.

    Call it on all tensor-parallel ranks before one of them takes any. It waits until each has asked: page-locked memory is
    taken at once, so a rank that asks late would find less.

    Args:
        config: for the sentence.
        tokens: logical, of the KV cache.
        host: bytes of the host tier of this rank.
        others: bytes of this rank's buffers and clusters that are not touched yet and lie in the same memory: 0 on a GPU.
        ranks: processes on this machine that take as much.
    """
    available = least_of_ranks(psutil.virtual_memory().available)
    needed = ranks * (host + others)
    if needed <= available:
        return
    fits = int(tokens * available / needed)
    raise ConfigError(
        f"host_ratio={config.host_ratio:g} with {tokens} tokens takes {needed / 1e9:.1f} GB of memory, "
        f"{ranks * host / 1e9:.1f} GB of them for the host tier, and {available / 1e9:.1f} GB are free: "
        f"use --max-total-tokens {fits} or less"
    )
