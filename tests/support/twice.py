"""Runs each decode step of a served model twice, its decoder layers by SGLang's modules and by ours, and compares.

For processes that are forked after `watch`.

A forward can be run again: keys and values go to the same slots, and who reads the lists of a step does not change them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.residual.access import buffer

from sglang_clusterkv.serving import cpu_decoder
from sglang_clusterkv.serving.cpu_platform import ClusterKVCpuPlatform


def watch(folder: Path) -> None:
    """From now on; what was found goes to files in a folder."""
    folder.mkdir()
    original = ClusterKVCpuPlatform.post_load_model

    def loaded(platform: ClusterKVCpuPlatform, model: torch.nn.Module) -> None:
        original(platform, model)
        layers = [layer for layer in model.modules() if _is_ours(layer)]
        if layers:
            model.forward = _Twice(model, layers, folder / f"{os.getpid()}")

    ClusterKVCpuPlatform.post_load_model = loaded


def _is_ours(layer: torch.nn.Module) -> bool:
    return isinstance(getattr(vars(layer).get("forward"), "__self__", None), cpu_decoder.Layer)


def told(folder: Path) -> dict[str, Any]:
    """Of all ranks: decode steps by what they were; and how many layers a model has that may run by ours."""
    found: Counter[str] = Counter()
    layers = set()
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            one = json.loads(line)
            layers.add(one.pop("layers"))
            found.update(name for name, is_so in one.items() if is_so)
    return {"layers": sorted(layers), "steps": dict(found)}


class _Twice:
    """In place of a model's forward."""

    def __init__(self, model: torch.nn.Module, layers: list[torch.nn.Module], log: Path) -> None:
        self._forward, self._layers, self._log = model.forward, layers, log
        self._stack = layers[0].forward.__self__._stack
        self._list = next(part for part in model.modules() if layers[0] in part._modules.values())
        self._seen = 0

    def __call__(self, input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **named: Any) -> Any:
        if not forward_batch.forward_mode.is_decode():
            return self._forward(input_ids, positions, forward_batch, *args, **named)
        found = []
        by_ours = False
        for ours in (False, True):
            begin = self._stack.begin
            stepped = []

            def begins(*given: Any, ours: bool = ours, begin: Any = begin, stepped: list[bool] = stepped) -> None:
                self._stack.step = None
                if ours:
                    begin(*given)
                stepped.append(self._stack.step is not None)

            self._stack.begin = begins
            try:
                answer = self._forward(input_ids, positions, forward_batch, *args, **named)
            finally:
                del self._stack.begin
            left = (answer.next_token_logits, answer.hidden_states)
            found.append([one.clone() for one in left if one is not None])
            by_ours = stepped == [True]
        same = all(map(torch.equal, *found))
        told: dict[str, Any] = {"decode": True, "ours": by_ours, "same": same, "layers": len(self._layers)}
        told |= {"hidden states": len(found[0]) > 1, f"{forward_batch.batch_size} tokens by ours": by_ours}
        if by_ours and self._seen == 0:
            self._seen += 1
            told["watched"] = self._is_watched(
                lambda: self._forward(input_ids, positions, forward_batch, *args, **named)
            )
        with self._log.open("a") as log:
            print(json.dumps(told), file=log)
        return answer

    def _is_watched(self, forward: Any) -> bool:
        """Whether what others do to modules has its effect, and is forgotten when it is undone."""
        expected = forward().next_token_logits.clone()
        module = self._layers[-1].mlp
        calls: list[Any] = []
        handle = module.act_fn.register_forward_hook(lambda *_: calls.append(1))
        watched = torch.equal(forward().next_token_logits, expected) and len(calls) == 1
        handle.remove()
        original = module.act_fn
        module.act_fn = _Doubled(original)
        watched = watched and not torch.equal(forward().next_token_logits, expected)
        module.act_fn = original
        self._list[0] = _WrittenTo(self._layers[0])
        watched = watched and not torch.equal(forward().next_token_logits, expected)
        self._list[0] = self._layers[0]
        module.down_proj.forward = lambda x, **named: (0 * type(module.down_proj).forward(module.down_proj, x)[0], None)
        watched = watched and not torch.equal(forward().next_token_logits, expected)
        del module.down_proj.forward
        norm = self._layers[0].input_layernorm
        kept = norm.weight.data
        norm.weight.data = 2 * kept  # somewhere else
        watched = watched and not torch.equal(forward().next_token_logits, expected)
        norm.weight.data = kept
        return watched and torch.equal(forward().next_token_logits, expected) and len(calls) == 1


class _Doubled(torch.nn.Module):
    """Another module in the place of one."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self._inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self._inner(x)


class _WrittenTo(torch.nn.Module):
    """A layer with somebody behind it who writes to what it left."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self._inner = inner

    def forward(self, *args: Any, **named: Any) -> Any:
        output = self._inner(*args, **named)
        buffer(output).mul_(2)  # on several ranks SGLang's is not summed up yet
        return output
