#!/bin/sh
# SGLang 0.5.23 beside transformers 5.19.0, which it requires: two kinds of rope are turned otherwise than the same config.json
# says to transformers, in which models are trained and measured.
# - "dynamic" (NTK) stretches the base for the longest text that the model may have, always. transformers leaves it alone up to
#   max_position_embeddings and stretches it then, by the length. So with a factor of 2 a prompt of a few tokens is read with a
#   base three times as large: all short answers come from other angles than those that the model was trained with.
# - "yarn" with attention_factor: the key is not read (its own name for it is attn_factor, which transformers does not have), and
#   keys and queries are both scaled by 0.1 ln(factor) + 1. Where the config says 1.0 and the factor is 4, all logits are 1.30
#   times as large.
# Linear, llama3, and yarn with mscale or truncate are turned alike. Nothing is logged.
#
# Run with SGLang's tables and transformers' functions (torch 2.13.0, CPU).
#
# Seen, base 1,000,000, 32,768 positions, a text of 1,001 tokens (angles of the last one, the slower half of the channels):
#   linear, factor 2                             logits x1.00, angles 0.0 degrees off
#   llama3, factor 8                             logits x1.00, angles 0.0 degrees off
#   yarn, factor 4                               logits x1.00, angles 0.0 degrees off
#   yarn, factor 4, truncate false               logits x1.00, angles 0.0 degrees off
#   yarn, factor 4, mscale 1, mscale_all_dim .5  logits x1.00, angles 0.0 degrees off
#   yarn, factor 4, attention_factor 1           logits x1.30, angles 0.0 degrees off
#   dynamic, factor 2                            logits x1.00, angles 24.5 degrees off

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile transformers==5.19.0 numpy==2.3.5
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23

cat >"$dir/case.py" <<'PY'
import importlib.abc
import importlib.machinery
import math
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
import transformers.modeling_utils  # noqa: F401  before SGLang's parts are imported
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

site = Path(sys.argv[1])


class Stands(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """In place of all other modules of SGLang, which need a server's packages: objects that take any call."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "sglang" or name.startswith("sglang.srt.layers.rotary_embedding"):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(site / name.replace(".", "/"))]
        return spec

    def create_module(self, spec):
        return MagicMock(name=spec.name, __spec__=spec, __path__=spec.submodule_search_locations)

    def exec_module(self, module):
        if module.__spec__.name == "sglang.srt.utils":
            for name in ("cpu", "cuda", "hip", "npu", "xpu", "musa", "mps"):
                setattr(module, f"is_{name}", lambda: False)
            module.cpu_has_amx_support = lambda: False
            module.get_bool_env_var = lambda name: False
        if module.__spec__.name == "sglang.srt.runtime_context":
            module.get_exec.return_value.deterministic.rl_on_policy_target = None
        if module.__spec__.name == "sglang.kernels.fused_op":
            module.BaseFusedOp = torch.nn.Module


sys.meta_path.insert(0, Stands())
from sglang.srt.layers.rotary_embedding import get_rope  # noqa: E402

CHANNELS, TOKENS = 128, 1001


def by_transformers(config):
    """Cosines and sines of the last token, as the models' rotary embeddings make them for a text of these tokens."""
    kind = config.rope_parameters["rope_type"]
    turns, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=TOKENS)
    angles = (TOKENS - 1) * turns
    return angles.cos() * factor, angles.sin() * factor


def by_sglang(config):
    scaling = config.rope_parameters
    length, base = config.max_position_embeddings, scaling["rope_theta"]
    rope = get_rope(CHANNELS, CHANNELS, length, base, rope_scaling=scaling, dtype=torch.float32)
    return rope.cos_sin_cache[TOKENS - 1].chunk(2)


def read(scaling):
    """How much larger SGLang's logits are, and how far its angles are off, in degrees."""
    config = Qwen2Config(
        hidden_size=8 * CHANNELS,
        num_attention_heads=8,
        max_position_embeddings=32768,
        rope_parameters={"rope_theta": 1000000.0, **scaling},
    )
    ours, theirs = by_sglang(config), by_transformers(config)
    larger = [float((cos**2 + sin**2).mean()) for cos, sin in (ours, theirs)]
    apart = torch.atan2(ours[1], ours[0]) - torch.atan2(theirs[1], theirs[0])
    apart = torch.remainder(apart + math.pi, 2 * math.pi) - math.pi
    return larger[0] / larger[1], math.degrees(float(apart[CHANNELS // 4 :].abs().max()))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [  # what it is called, the parameters, how much larger, how many degrees
    ("linear, factor 2", {"rope_type": "linear", "factor": 2.0}, 1.0, 0.0),
    ("llama3, factor 8", {**LLAMA3, "original_max_position_embeddings": 8192}, 1.0, 0.0),
    ("yarn, factor 4", YARN, 1.0, 0.0),
    ("yarn, factor 4, truncate false", {**YARN, "truncate": False}, 1.0, 0.0),
    ("yarn, factor 4, mscale 1, mscale_all_dim .5", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.0, 0.0),
    ("yarn, factor 4, attention_factor 1", {**YARN, "attention_factor": 1.0}, 1.3, 0.0),
    ("dynamic, factor 2", {"rope_type": "dynamic", "factor": 2.0}, 1.0, 24.5),
]
for name, scaling, larger, degrees in CASES:
    seen = read(scaling)
    print(f"{name:44} logits x{seen[0]:.2f}, angles {seen[1]:.1f} degrees off")
    assert abs(seen[0] - larger) < 0.01 and abs(seen[1] - degrees) < 0.1, seen
# With both keys the two agree.
assert abs(read({**YARN, "attention_factor": 1.0, "attn_factor": 1 / (0.1 * math.log(4) + 1)})[0] - 1) < 0.01
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
