"""Functions of ours before, after or around SGLang's own, with the assurance that each took effect."""

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from sglang_clusterkv.config import ConfigError


def add_hooks(targets: Sequence[tuple[str, Callable[..., Any], Any]]) -> None:
    """Apply hooks to this process: each a target's dotted name, our function, SGLang's HookType.

    Raises ConfigError when one did not take effect: SGLang's registry patches each target only once, and only logs.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource

    source = HookSource(plugin_name="clusterkv", dist_name="sglang-clusterkv")
    before = {target: _attribute(target) for target, _, _ in targets}
    for target, hook, kind in targets:
        HookRegistry.register(target, hook, kind, source=source)
    HookRegistry.apply_hooks()
    ignored = [target for target, _, _ in targets if _attribute(target) is before[target]]
    if ignored:
        raise ConfigError(
            f"another plugin has hooked {', '.join(ignored)} already: leave it out with SGLANG_PLUGINS=clusterkv"
        )


def _attribute(target: str) -> Any:
    owner, name = target.rsplit(".", 1)
    return inspect.getattr_static(pkgutil.resolve_name(owner), name)
