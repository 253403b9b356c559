"""What of a model decides whether it can be served."""

from dataclasses import dataclass
from typing import Any


def shares_kv(text_config: Any) -> bool:
    """Whether layers of a model, by its text configuration, read another layer's KV."""
    layers = getattr(text_config, "num_kv_shared_layers", 0)
    across = getattr(text_config, "use_cla", False) and getattr(text_config, "cla_share_factor", 1) > 1
    return bool(layers) or bool(across)


@dataclass(frozen=True)
class ModelFacts:
    """What the table needs to know about a model, read from SGLang's ModelConfig by the plugin."""

    head_dim: int
    v_head_dim: int
    mla: bool = False
    encoder_decoder: bool = False
    hybrid_swa: bool = False  # two KV pools, one of them for sliding-window layers
    hybrid_linear: bool = False  # Mamba, GDN, KDA, lightning: layers without KV
    own_sparse: bool = False  # DSA, QSA, MiniMax sparse, DeepSeek V4: the model brings its selection
    chunked_attention: bool = False  # Llama 4's local layers, dual chunk attention
    generates: bool = True
    logit_cap: float = 0.0  # of every layer
    layers: int | None = None
    own_backends: bool = False  # SGLang serves it by backends that it names, and ends with an assertion on others
    shared_kv: bool = False  # some layers read another layer's KV
