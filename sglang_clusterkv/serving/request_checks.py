"""Refuse, with a sentence, token ids that would end SGLang's scheduler.

SGLang 0.5.23 looks at a prompt's length alone. An id outside the vocabulary, or a prompt of no token at all (an empty text and
a tokenizer that adds none), then raises in the model's forward and takes the scheduler with it, whatever the attention backend.
So the process that tokenizes asks first; a ValueError there is SGLang's own way to a 400.
"""

from __future__ import annotations

from typing import Any

from sglang_clusterkv.serving import active
from sglang_clusterkv.serving.hooks import add_hooks

_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
_installed = False


def install() -> None:
    """Hook the tokenizer manager of this process; a process that does so again changes nothing.

    Raises ConfigError when another plugin has hooked it already.
    """
    global _installed
    if _installed:
        return
    from sglang.srt.plugins.hook_registry import HookType

    add_hooks([(_TARGET, _before_validation, HookType.BEFORE)])
    _installed = True


def _before_validation(manager: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> None:
    # Inputs that bring embeddings, images or sound fill places of their own.
    if active.active_config() is None or obj.contains_mm_input() or getattr(obj, "input_embeds", None) is not None:
        return
    # A session's history may be all there is; SGLang looks itself whether anything is left.
    if not input_ids and getattr(obj, "session_params", None):
        return
    if problem := problem_of(input_ids, manager.model_config.vocab_size):
        raise ValueError(problem)


def problem_of(input_ids: list[int] | None, vocab_size: int) -> str | None:
    """What is wrong with a prompt's ids, in a sentence; None where nothing is."""
    if input_ids is None or len(input_ids) == 0:
        return "The prompt has no token: send at least one."
    lowest, highest = min(input_ids), max(input_ids)
    if lowest >= 0 and highest < vocab_size:
        return None
    wrong = lowest if lowest < 0 else highest
    return f"Token id {wrong} is outside the model's vocabulary: use ids from 0 to {vocab_size - 1}."
