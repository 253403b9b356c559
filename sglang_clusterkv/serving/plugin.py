"""SGLang's entry point: registers the backend, its flag, its checks and its hooks.

Every process of a server runs `register` (SGLang calls it through load_plugins). It adds a choice, a flag and checks
that ask first whether clusterkv is the chosen backend. The hooks that a scheduler needs are added when a scheduler
process publishes a configuration with clusterkv, so nothing of SGLang's running path is touched without the flag.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

from sglang_clusterkv.config import ENVIRONMENT, FLAG, ClusterKVConfig, ConfigError, fit_defaults, load_config, validate
from sglang_clusterkv.memory import movement
from sglang_clusterkv.serving import compat, prefill_backend, sglang_differences, sglang_symbols
from sglang_clusterkv.serving.active import config_of, keep_config
from sglang_clusterkv.serving.compat import BACKEND
from sglang_clusterkv.serving.late_refusal import sentence_alone
from sglang_clusterkv.serving.model_facts import ModelFacts, shares_kv
from sglang_clusterkv.serving.platform import apply_thread_count, is_our_platform

logger = logging.getLogger(__name__)

DEFAULT_PAGE_SIZE = 16
_DISTRIBUTION = "sglang-clusterkv"
# Architectures that SGLang's own code names too: what it does for them is in no configuration.
_GROK = {"Grok1ForCausalLM", "Grok1ModelForCausalLM"}
_GROK_CAP = 30.0
_GEMMA_4 = {"Gemma4ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4UnifiedForConditionalGeneration"}
_EXAONE_4 = {"Exaone4ForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"}
# Attribute of SGLang's ServerArgs: what --clusterkv-config said; present when the record comes from a command line.
_FLAG_VALUE = "_clusterkv_config"


def register() -> None:
    """Make `--attention-backend clusterkv` known to this process (entry point sglang.srt.plugins)."""
    differences = sglang_differences.check(sglang_symbols.REGISTRATION)
    if differences:
        message = _differs(differences)
        if any(BACKEND in argument for argument in sys.argv[1:]):
            raise SystemExit(f"{_DISTRIBUTION}: {message}")
        logger.debug("%s is inactive: %s", _DISTRIBUTION, message)
        return
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(_create_backend)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.add_cli_args", _after_add_cli_args, HookType.AFTER)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.from_cli_args", _after_from_cli_args, HookType.AFTER)
    HookRegistry.register("sglang.srt.runtime_context.publish", _after_publish, HookType.AFTER)
    register_resolution_hook("handle_pd_disaggregation")(_check_arguments)
    register_resolution_hook("handle_model_specific_adjustments")(_check_model)
    register_resolution_hook("handle_attention_backend_compatibility")(_declare_defaults)
    register_resolution_hook("handle_model_capability_adjustments")(_resolve_config)


def _create_backend(runner: Any) -> Any:
    from sglang_clusterkv.serving.backend import create_backend

    with sentence_alone():
        return create_backend(runner)


def _after_add_cli_args(result: None, parser: Any) -> None:
    parser.add_argument(
        FLAG,
        type=str,
        default=None,
        help=f"Configuration of --attention-backend {BACKEND}: JSON text or the path of a JSON file. "
        f"Without it, {ENVIRONMENT} is read the same way.",
    )


def _after_from_cli_args(server_args: Any, cls: type, arguments: Any) -> None:
    setattr(server_args, _FLAG_VALUE, getattr(arguments, FLAG[2:].replace("-", "_"), None))


# The checks, in the order of SGLang's resolution pipeline.


def _chosen(server_args: Any) -> Any:
    """The arguments as resolved so far, where clusterkv is the backend of a phase; else None."""
    from sglang.srt.arg_groups.overrides import resolved_view

    view = resolved_view(server_args)
    named = (view.attention_backend, view.prefill_attention_backend, view.decode_attention_backend)
    return view if BACKEND in named else None


def _refuse(server_args: Any, message: str) -> NoReturn:
    """End the start: on a command line with the sentence alone, in a library call with a ValueError to handle."""
    if hasattr(server_args, _FLAG_VALUE):
        raise SystemExit(f"{_DISTRIBUTION}: {message}")
    raise ConfigError(message)


def _check_arguments(server_args: Any, previous: Callable[[Any], None]) -> None:
    view = _chosen(server_args)
    if view is not None:
        if sentence := compat.refusal(view):
            _refuse(server_args, sentence)
        _load(server_args)
        if differences := sglang_differences.check():
            _refuse(server_args, _differs(differences))
    elif getattr(server_args, _FLAG_VALUE, None):
        logger.warning("%s has no effect without --attention-backend %s", FLAG, BACKEND)
    previous(server_args)


def _check_model(server_args: Any, previous: Callable[[Any], None]) -> None:
    # Before SGLang's own step, which would end some of these with an assertion.
    view = _chosen(server_args)
    if view is not None and (sentence := compat.refusal(view, _model_facts(server_args))):
        _refuse(server_args, sentence)
    with _passes_as_triton() if view is not None and _is_gpt_oss(server_args) else nullcontext():
        previous(server_args)


def _is_gpt_oss(server_args: Any) -> bool:
    from sglang.srt.arg_groups.overrides import model_config_of

    return "GptOssForCausalLM" in (model_config_of(server_args).hf_config.architectures or ())


@contextmanager
def _passes_as_triton() -> Iterator[None]:
    """While SGLang looks whether its list of backends for a model has the chosen one: ours does what Triton's does."""
    from sglang.srt.arg_groups import model_hook

    original = model_hook.attention_backends_of
    model_hook.attention_backends_of = lambda cfg: tuple("triton" if b == BACKEND else b for b in original(cfg))
    try:
        yield
    finally:
        model_hook.attention_backends_of = original


def _declare_defaults(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    view = _chosen(server_args)
    if view is None:
        return
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import Phase

    if view.page_size is None:
        declare_resolution(server_args, BACKEND, page_size=DEFAULT_PAGE_SIZE)
    config = _load(server_args)
    if config.host_ratio > 1:
        # A prefill may read a prefix from elsewhere in every pass, and no graph of one has been looked at.
        why = "a host tier does not support them yet"
        _leave_out_graphs(server_args, Phase.PREFILL, why)
        _leave_out_graphs(server_args, Phase.DECODE, why)
    if config.trace:
        _leave_out_graphs(server_args, Phase.DECODE, "traces look at each layer of a step")
    if view.device == "cpu":  # there are none in any case
        _leave_out_graphs(server_args, Phase.DECODE, None)


def _leave_out_graphs(server_args: Any, phase: str, why: str | None) -> None:
    """Capture no graphs of a phase, and say why."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, with_phase

    graphs = resolved_view(server_args).cuda_graph_config
    if graphs is not None and graphs[phase].backend != Backend.DISABLED:
        off = with_phase(graphs, phase, backend=Backend.DISABLED)
        declare_resolution(server_args, BACKEND, cuda_graph_config=off)
        if why is not None and resolved_view(server_args).device != "cpu":
            logger.info("%s CUDA graphs are off: %s", phase.capitalize(), why)


def _resolve_config(server_args: Any, previous: Callable[[Any], None]) -> None:
    named_before = _chosen(server_args) is not None
    previous(server_args)
    if not named_before:
        return
    view = _chosen(server_args)
    if view is None:
        _refuse(server_args, "SGLang forces another attention backend for this model: leave out --attention-backend")
    facts = _model_facts(server_args)
    config = fit_defaults(_load(server_args), view.page_size)
    options = {
        "host_tier": config.host_ratio > 1,
        "recall_extends": config.recall_extend_tokens > 0,
    }
    if sentence := compat.refusal(view, facts, trace=config.trace, **options):
        _refuse(server_args, sentence)
    try:
        validate(config, view.page_size, facts.head_dim, facts.layers)
        _check_host_tier(config, view)
        config = movement.resolve(prefill_backend.resolve(config, server_args, view), view.device or "cpu")
    except ConfigError as error:
        _refuse(server_args, str(error))
    keep_config(server_args, config)


def _check_host_tier(config: ClusterKVConfig, view: Any) -> None:
    """Raise ConfigError where the tokens that were asked for leave too few of them on the device.

    A KV cache that SGLang sizes by itself is checked in the scheduler, once it is.
    """
    if config.host_ratio > 1 and view.max_total_tokens and view.chunked_prefill_size:
        from sglang_clusterkv.serving import host_tier

        tokens = view.max_total_tokens // view.page_size * view.page_size
        host_tier.rows_that_fit(
            config, tokens=tokens, chunk_tokens=view.chunked_prefill_size, page_size=view.page_size, rows=1
        )


def _load(server_args: Any) -> ClusterKVConfig:
    try:
        return load_config(getattr(server_args, _FLAG_VALUE, None), os.environ)
    except ConfigError as error:
        _refuse(server_args, str(error))


def _model_facts(server_args: Any) -> ModelFacts:
    from sglang.srt.arg_groups.overrides import model_config_of, use_mla_backend
    from sglang.srt.configs import model_config as models
    from sglang.srt.configs.hybrid_arch import mambaish_config

    model = model_config_of(server_args)
    text = model.hf_text_config
    architectures = set(model.hf_config.architectures or ())
    sparse = (models.is_deepseek_dsa, models.is_deepseek_v4, models.is_minimax_sparse, models.is_qwen4_exp)
    return ModelFacts(
        head_dim=model.head_dim,
        v_head_dim=model.v_head_dim,
        mla=use_mla_backend(server_args),
        encoder_decoder=model.is_encoder_decoder,
        hybrid_swa=model.is_hybrid_swa,
        hybrid_linear=mambaish_config(model) is not None,
        own_sparse=any(is_sparse(model.hf_config) for is_sparse in sparse),
        chunked_attention=model.attention_chunk_size is not None
        or getattr(model.hf_config, "dual_chunk_attention_config", None) is not None,
        generates=model.is_generation,
        logit_cap=getattr(text, "attn_logit_softcapping", _GROK_CAP if architectures & _GROK else None) or 0.0,
        own_backends=bool(
            architectures & _GEMMA_4
            or architectures & _EXAONE_4
            and getattr(model.hf_config, "sliding_window_pattern", None) is not None
        ),
        layers=model.num_hidden_layers,
        shared_kv=shares_kv(text),
    )


def _differs(differences: list[sglang_differences.Difference]) -> str:
    listed = "; ".join(map(str, differences[:3])) + (f"; and {len(differences) - 3} more" if differences[3:] else "")
    return (
        f"the installed SGLang is not the one it was made for ({listed}): install sglang 0.5.23 or 0.5.22, or a newer "
        f"{_DISTRIBUTION} (`{_DISTRIBUTION} check` lists all)"
    )


# The hooks of a process that schedules, added when it publishes a configuration with clusterkv.


def _after_publish(context: Any, server_args: Any, *, role: str, ranks: Any = None, **rest: Any) -> None:
    if config_of(server_args) is None and _chosen(server_args) is not None:
        raise ConfigError(
            "the server's arguments were resolved before SGLang's plugins were loaded, so nothing would be clustered: call "
            "sglang.srt.plugins.load_plugins() before ServerArgs is made, or start through sglang.launch_server or sgl.Engine"
        )
    if role != "scheduler":
        return
    from sglang.srt.platforms import current_platform

    if is_our_platform(current_platform):
        apply_thread_count(ranks.gpu_id if ranks is not None and ranks.gpu_id is not None else 0)
    if config_of(server_args) is not None:
        from sglang_clusterkv.serving.scheduler_hooks import install

        install(current_platform)
