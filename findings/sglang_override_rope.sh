#!/bin/sh
# SGLang 0.5.23 beside transformers 5.19.0, which it requires: --json-model-override-args, by which models are told to scale
# their positions, does less than it says. transformers keeps base and scaling in one dict, rope_parameters, and SGLang reads
# that alone:
# - {"rope_scaling": {"type": "yarn", ...}}, the spelling of older model cards, is laid over a dict in which rope_type is
#   "default" already. Both keys are there then, and "default" counts: no YaRN. With "rope_type" it is YaRN.
# - {"rope_theta": ...} becomes an attribute that is not read: the base stays.
# - {"text_config": {"rope_scaling": ...}}, for a model that also sees, replaces the dict, and the base in it: 10,000 for
#   1,000,000,000.
# Nothing is logged of it. With max_position_embeddings in the same override long prompts are taken, and read at positions that
# the model never saw; the last one turns all keys wrongly, of short prompts too. In a config.json each of the three is read as
# it is meant.
#
# Run with what SGLang does with the argument, its own reading of the result and its tables (torch 2.13.0, CPU).
#
# Seen (base 1,000,000 in Qwen2's config.json, 1,000,000,000 in that of Mistral 3's text_config):
#   qwen2    {}                                                        RotaryEmbedding, base 1,000,000
#   qwen2    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, ".. YaRNScalingRotaryEmbedding, base 1,000,000
#   qwen2    {"rope_scaling": {"type": "yarn", "factor": 4.0, "origi.. RotaryEmbedding, base 1,000,000
#   qwen2    {"rope_theta": 5000000.0}                                 RotaryEmbedding, base 1,000,000
#   mistral3 {}                                                        RotaryEmbedding, base 1,000,000,000
#   mistral3 {"text_config": {"rope_scaling": {"rope_type": "yarn", .. YaRNScalingRotaryEmbedding, base 10,000

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
import ast
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import transformers.modeling_utils  # noqa: F401  before SGLang's parts are imported
from transformers import AutoConfig, PretrainedConfig

site, folder = Path(sys.argv[1]), Path(tempfile.mkdtemp())


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


def function(file, name, **names):
    """Out of a module that needs a server's packages."""
    tree = ast.parse((site / "sglang/srt/utils/hf_transformers" / file).read_text())
    (node,) = [node for node in tree.body if getattr(node, "name", None) == name]
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
        argument.annotation = None
    exec(compile(ast.Module([node], []), file, "exec"), names)
    return names[name]


def parser(name):
    return SimpleNamespace(parse=lambda path, trust_remote_code, revision: AutoConfig.from_pretrained(path))


sys.meta_path.insert(0, Stands())
from sglang.srt.layers.rotary_embedding import get_rope  # noqa: E402

get_config = function(
    "config.py",
    "get_config",
    PretrainedConfig=PretrainedConfig,
    DeepseekV41Config=type("DeepseekV41Config", (), {}),
    check_gguf_file=lambda path: False,
    resolve_runai_obj_uri=lambda path: path,
    is_remote_url=lambda path: False,
    is_mistral_model=lambda path: False,
    get_model_config_parser=parser,
)
get_rope_config = function("common.py", "get_rope_config")

QWEN2 = {"model_type": "qwen2", "rope_theta": 1000000.0, "max_position_embeddings": 32768}
MISTRAL = {"model_type": "mistral", "rope_theta": 1000000000.0, "max_position_embeddings": 131072, "head_dim": 128}
MISTRAL3 = {"model_type": "mistral3", "text_config": MISTRAL}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
PLAIN, SCALED = "RotaryEmbedding", "YaRNScalingRotaryEmbedding"


def told(fields, override):
    """What SGLang turns by: the class of its table, its base, and how many positions it has."""
    (folder / "config.json").write_text(json.dumps(fields))
    config = get_config(str(folder), False, model_override_args=override)
    config = getattr(config, "text_config", config)
    base, scaling = get_rope_config(config)
    rope = get_rope(128, 128, config.max_position_embeddings, base, rope_scaling=scaling, dtype=torch.float32)
    return type(rope).__name__, int(rope.base)


CASES = [  # config.json, the override, what is turned by
    (QWEN2, {}, (PLAIN, 1000000)),
    (QWEN2, {"rope_scaling": {"rope_type": "yarn", **YARN}}, (SCALED, 1000000)),
    (QWEN2, {"rope_scaling": {"type": "yarn", **YARN}}, (PLAIN, 1000000)),
    (QWEN2, {"rope_theta": 5000000.0}, (PLAIN, 1000000)),
    (MISTRAL3, {}, (PLAIN, 1000000000)),
    (MISTRAL3, {"text_config": {"rope_scaling": {"rope_type": "yarn", **YARN}}}, (SCALED, 10000)),
]
for fields, override, expected in CASES:
    seen = told(fields, override)
    shown = json.dumps(override)
    print(f"{fields['model_type']:8} {shown if len(shown) < 58 else shown[:55] + '..':57} {seen[0]}, base {seen[1]:,}")
    assert seen == expected, seen
# All of it in the dict that is read, or in a config.json.
assert told(QWEN2, {"rope_scaling": {"rope_theta": 5000000.0}}) == (PLAIN, 5000000)
whole = {"rope_type": "yarn", "rope_theta": 1000000000.0, **YARN}
assert told(MISTRAL3, {"text_config": {"rope_scaling": whole}}) == (SCALED, 1000000000)
assert told({**QWEN2, "rope_scaling": {"type": "yarn", **YARN}}, {}) == (SCALED, 1000000)
assert told({**QWEN2, "rope_theta": 5000000.0}, {}) == (PLAIN, 5000000)
within = {**MISTRAL3, "text_config": {**MISTRAL, "rope_scaling": {"rope_type": "yarn", **YARN}}}
assert told(within, {}) == (SCALED, 1000000000)
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
