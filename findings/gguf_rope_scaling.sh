#!/bin/sh
# transformers 5.24.0 on a GGUF file (gguf 0.19.0): the base of rope is read, its scaling is not. llama.cpp keeps YaRN and linear
# scaling under `llama.rope.scaling.*`, and that of Llama 3.1 to 3.3 as a tensor, rope_freqs.weight, of one divisor for each pair of
# channels. transformers skips both (gpt-oss alone has its YaRN read), says nothing at its usual level, and keeps the long context's
# length: a Llama 3.1 of 131,072 tokens with the angles of one that was never stretched, a YaRN model without it. The same file
# answers well in llama.cpp. SGLang 0.5.23 reads a llama's GGUF so, too, where no config.json lies beside it (read in its source).
#
# Seen:
#   rope_freqs.weight               131,072 tokens, rope_type default, unscaled angles: True, warnings: 0
#   llama.rope.scaling.type yarn    131,072 tokens, rope_type default, unscaled angles: True, warnings: 0
#   llama.rope.scaling.type linear  131,072 tokens, rope_type default, unscaled angles: True, warnings: 0

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import logging
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
HIDDEN, HEAD, BASE, LENGTH = 64, 32, 500000.0, 131072
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (HIDDEN, HIDDEN),
    "ffn_up": (HIDDEN, HIDDEN),
    "ffn_down": (HIDDEN, HIDDEN),
}


class Warned(logging.Handler):
    """Keeps what is said of the file."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def write(kind):
    """A llama of one layer, with a scaling as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HIDDEN // HEAD)
    writer.add_head_count_kv(HIDDEN // HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    random = np.random.default_rng(0)
    if kind == "tensor":
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, HEAD // 2, dtype=np.float32))
    else:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(LENGTH // 8)
    tensors = {"token_embd": (8, HIDDEN), "output_norm": (HIDDEN,), "output": (8, HIDDEN)}
    tensors |= {f"blk.0.{name}": shape for name, shape in SHAPES.items()}
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


warned = Warned()
logging.getLogger("transformers").addHandler(warned)
unscaled = BASE ** -(torch.arange(0, HEAD, 2) / HEAD)
for kind in ("tensor", "yarn", "linear"):
    write(kind)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    config, angles = model.config, model.model.rotary_emb.inv_freq
    same = torch.allclose(angles, unscaled)
    rope = config.rope_parameters
    assert config.max_position_embeddings == LENGTH and rope["rope_theta"] == BASE
    where = "rope_freqs.weight" if kind == "tensor" else f"llama.rope.scaling.type {kind}"
    told = f"{config.max_position_embeddings:,} tokens, rope_type {rope['rope_type']}, unscaled angles: {same}"
    print(f"{where:31} {told}, warnings: {len(warned.lines)}")
    assert same and rope["rope_type"] == "default" and not warned.lines, warned.lines
PY
"$python" "$dir/case.py" "$dir" 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
