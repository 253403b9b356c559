"""Which of SGLang's backends prefills on a GPU: the one it would take itself, unless another one is asked for.

Chosen where arguments are resolved, and kept in the resolved configuration, so that every process has the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.serving.platform import is_our_platform

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner

TRTLLM_PAGE_SIZES = (16, 32, 64, 128)  # SGLang changes other page sizes for this backend
TIER_BACKENDS = ("flashinfer", "triton")  # these ask for the indices of what they read (tier_prefill.py)
SINK_BACKENDS = ("fa3", "triton")  # these take learned attention sinks in the type in which SGLang keeps them for us
# In this order, where SGLang's own choice is none that prefills here.
_OTHERS = ("flashinfer", "triton")


def choose(config: ClusterKVConfig, view: Any, sglang_choice: str, sinks: bool = False) -> str:
    """The backend that prefills on the GPU of this machine.

    Args:
        config: the configuration; `prefill_backend` and `host_ratio` count.
        view: SGLang's resolved arguments; the page size counts.
        sglang_choice: what SGLang would take by default.
        sinks: whether the model has learned attention sinks.

    Raises:
        ConfigError: the backend that was asked for does not run here; the sentence says why and what to do.
    """
    asked = config.prefill_backend
    if asked != "auto":
        if why := unusable(asked, config, view.page_size, sinks):
            raise ConfigError(f"prefill_backend={asked} {why}, or set it to auto")
        return asked
    choices = (name for name in (sglang_choice, *_OTHERS) if unusable(name, config, view.page_size, sinks) is None)
    return next(choices)


def unusable(name: str, config: ClusterKVConfig, page_size: int, sinks: bool) -> str | None:
    """Why a backend does not prefill on this GPU, in words that follow its name; None where it does.

    Args:
        name: of the backend, one of `NAMES` or any other of SGLang's.
        config: `host_ratio` counts.
        page_size: tokens per page.
        sinks: whether the model has learned attention sinks.
    """
    if sinks and name not in SINK_BACKENDS:
        return f"does not take this model's learned attention sinks: use {' or '.join(SINK_BACKENDS)}"
    if config.host_ratio > 1 and name not in TIER_BACKENDS:
        return f"reads a prefix by pages, some of which are on the host: use {' or '.join(TIER_BACKENDS)}"
    return _UNUSABLE[name](page_size) if name in _UNUSABLE else "is none that clusterkv prefills with: use triton"


def _fa3(page_size: int) -> str | None:
    from sglang.srt.runtime_context import get_platform

    major, minor = get_platform().device_capability
    if major not in (8, 9):
        return (
            f"needs a GPU of compute capability 8 or 9 and this one has {major}.{minor}: use trtllm_mha or flashinfer"
        )
    return None


def _trtllm(page_size: int) -> str | None:
    from sglang.srt.runtime_context import get_platform

    if not get_platform().is_sm100:
        major, minor = get_platform().device_capability
        return f"needs a GPU of compute capability 10.0 or 10.3 and this one has {major}.{minor}: use fa3 or flashinfer"
    if page_size not in TRTLLM_PAGE_SIZES:
        sizes = ", ".join(map(str, TRTLLM_PAGE_SIZES[:-1]))
        return f"reads pages of {sizes} or {TRTLLM_PAGE_SIZES[-1]} tokens: use such a --page-size"
    return None


def _flashinfer(page_size: int) -> str | None:
    from sglang.srt.runtime_context import get_platform

    return None if get_platform().has_flashinfer else "is not installed: use triton"


_UNUSABLE = {"fa3": _fa3, "trtllm_mha": _trtllm, "flashinfer": _flashinfer, "triton": lambda page_size: None}
NAMES = tuple(_UNUSABLE)


def resolve(config: ClusterKVConfig, server_args: Any, view: Any) -> ClusterKVConfig:
    """The configuration with the backend's name in it; as it is on a CPU, which prefills by our own kernel.

    Raises ConfigError as `choose` does, where a backend is asked for on a CPU, and where there is no GPU.
    """
    import msgspec

    if (view.device or "cpu") == "cpu":
        if config.prefill_backend != "auto":
            raise ConfigError(f"prefill_backend={config.prefill_backend} is for a GPU: leave it out on a CPU")
        return config
    from sglang.srt.arg_groups.model_override_base import current_platform, get_default_attn_backend
    from sglang.srt.arg_groups.overrides import model_config_of, use_mla_backend

    if is_our_platform(current_platform):
        raise ConfigError(f"torch finds no GPU for --device {view.device}: let it see one, or use --device cpu")
    model = model_config_of(server_args)
    own = get_default_attn_backend(view, use_mla_backend(view), model)
    return msgspec.structs.replace(config, prefill_backend=choose(config, view, own, model.has_attention_sinks))


def create(runner: ModelRunner, config: ClusterKVConfig | None) -> AttentionBackend:
    """SGLang's backend for a model runner; without a configuration (SGLang's unit kits) one that runs on every GPU."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    name = "auto" if config is None else config.prefill_backend
    return ATTENTION_BACKENDS["triton" if name == "auto" else name](runner)


class PrefillFacts:
    """What SGLang's prefill asks of an attention backend, answered by the one that prefills; a mixin of ours.

    The base class's answers, where our own kernel prefills. `_snapshot_prefill_shared_reads` is not among them: our hooks read
    rows at the head of a forward, so SGLang has to wait for the whole of it.
    """

    prefill: AttentionBackend | None

    @property
    def extend_dummy_seqs_capped_by_req_pool(self) -> bool:
        """Whether warm-ups must not have more requests than the pool has rows."""
        return getattr(self.prefill, "extend_dummy_seqs_capped_by_req_pool", False)

    @property
    def supports_prefill_cuda_graph_max_context_size(self) -> bool:
        """Whether prefill graphs may be captured for a fixed longest context."""
        return getattr(self.prefill, "supports_prefill_cuda_graph_max_context_size", False)

    @property
    def prefill_cuda_graph_default_max_seq_len(self) -> int | None:
        """Longest context of a replayed prefill graph, where the user says none."""
        return getattr(self.prefill, "prefill_cuda_graph_default_max_seq_len", None)

    @property
    def prefill_cuda_graph_max_batch_size(self) -> int | None:
        """Most requests of a replayed prefill graph."""
        return getattr(self.prefill, "prefill_cuda_graph_max_batch_size", None)

    def get_fused_kv_write_buffers(self, layer: Any, forward_batch: Any) -> Any:
        """Where a model that rotates and writes keys in one kernel writes them in a prefill; None: through us."""
        if self.prefill is None or not forward_batch.forward_mode.is_extend():
            return None
        return self.prefill.get_fused_kv_write_buffers(layer, forward_batch)
