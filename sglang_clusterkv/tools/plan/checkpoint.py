"""What a model's folder says of its size, before anything is loaded: config.json and the sizes of the weights' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from sglang_clusterkv.serving.model_facts import ModelFacts

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8_e4m3": 1, "fp8_e5m2": 1}
_DEFAULT_SLIDING_PATTERN = {"gemma3": 6, "gemma3_text": 6}  # every sixth layer sees everything, unless said otherwise
_LINEAR_KINDS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent"}


class PlanError(ValueError):
    """Nothing can be planned; the message is one sentence with the fix."""


class Checkpoint(NamedTuple):
    """A model as its folder describes it.

    Attributes:
        name: of the folder or file.
        layers: attention layers.
        sliding_layers: those of them that see a window only.
        window: tokens of it, 0 where no layer slides.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: channels of a key and of a value.
        dtype: of the weights, and so of the KV cache unless one says otherwise, by `ITEM_BYTES`.
        weight_bytes: of all files, None where there are none.
        table_bytes: of the embeddings that a step looks up and does not read: 0 where they are the last layer too.
        most_tokens: the longest context that the configuration names, None where it names none.
        facts: what decides whether it is served.
    """

    name: str
    layers: int
    sliding_layers: int
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    weight_bytes: int | None
    table_bytes: int
    most_tokens: int | None
    facts: ModelFacts

    @property
    def item_bytes(self) -> int:
        """Of a channel in the KV cache."""
        return ITEM_BYTES[self.dtype]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a model's folder, or a config.json alone.

    Raises PlanError where there is no configuration, or one without attention heads.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"cannot read {file} ({error.strerror}): pass the folder of a model that is on this machine, or its config.json"
        ) from None
    except ValueError:
        raise PlanError(f"{file} is not JSON: pass the folder of a model, or its config.json") from None
    if not isinstance(raw, dict):
        raise PlanError(f"{file} is no object: pass the folder of a model, or its config.json")
    text = raw.get("text_config") or raw
    try:
        return _checkpoint(file, raw, text)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PlanError(
            f"{file} is not the configuration of a model with attention heads ({type(error).__name__}: {error}): "
            "pass that of a text model"
        ) from None


def _checkpoint(file: Path, raw: dict[str, Any], text: dict[str, Any]) -> Checkpoint:
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    hidden = int(text["hidden_size"])
    head_dim = int(text.get("head_dim") or hidden // heads)
    dtype = str(
        text.get("dtype") or text.get("torch_dtype") or raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    )
    if dtype not in ITEM_BYTES:
        dtype = "bfloat16"
    sliding = _sliding_layers(text, layers)
    weights = _weight_bytes(file.parent)
    tied = bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    return Checkpoint(
        name=file.resolve().parent.name if file.name == "config.json" else file.stem,
        layers=layers,
        sliding_layers=sliding,
        window=int(text["sliding_window"]) if sliding else 0,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        dtype=dtype,
        weight_bytes=weights,
        table_bytes=0 if tied else int(text.get("vocab_size") or 0) * hidden * ITEM_BYTES[dtype],
        most_tokens=text.get("max_position_embeddings"),
        facts=_facts(raw, text, head_dim, layers),
    )


def _sliding_layers(text: dict[str, Any], layers: int) -> int:
    """How many layers see a window only."""
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return 0
    kinds = text.get("layer_types")
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds)
    pattern = text.get("sliding_window_pattern") or _DEFAULT_SLIDING_PATTERN.get(text.get("model_type", ""))
    return layers - layers // int(pattern) if pattern else layers


def _weight_bytes(folder: Path) -> int | None:
    """Bytes of the weights' files, or what their index says of them."""
    if files := list(folder.glob("*.safetensors")):
        return sum(file.stat().st_size for file in files)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        return int(total) if total else None
    return None


def _facts(raw: dict[str, Any], text: dict[str, Any], head_dim: int, layers: int) -> ModelFacts:
    """What the configuration alone tells of `ModelFacts`; the start of a server asks SGLang and knows more."""
    architectures = [str(name) for name in raw.get("architectures") or ()]
    kinds = set(text.get("layer_types") or ())
    return ModelFacts(
        head_dim=head_dim,
        v_head_dim=int(text.get("v_head_dim") or head_dim),
        mla=bool(text.get("kv_lora_rank")),
        encoder_decoder=bool(raw.get("is_encoder_decoder")),
        hybrid_linear=bool(kinds & _LINEAR_KINDS)
        or "hybrid_override_pattern" in text
        or "full_attention_interval" in text,
        chunked_attention=bool(text.get("attention_chunk_size")) or bool(text.get("dual_chunk_attention_config")),
        generates=not architectures or any("ForCausalLM" in name or "Generation" in name for name in architectures),
        logit_cap=float(text.get("attn_logit_softcapping") or 0.0),
        layers=layers,
        shared_kv=bool(text.get("num_kv_shared_layers")),
    )
