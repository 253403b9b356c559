#!/bin/sh
# SGLang 0.5.23, models with `longrope` (Phi-3 and Phi-3.5 of 128k, Phi-4-mini): one request beyond the length of the pretraining
# changes what every other request of its batch computes. Such a model has two tables of angles, for texts of up to 4,096 tokens and
# for longer ones. SGLang takes one of them for all of a forward, by its largest position: a short request that decodes beside a
# long one has its query turned by the long table, while its keys lie in the cache as the short one turned them, until the stranger is
# done. A long prompt has other keys in chunks, or behind a prefix that a short one left in the cache, than at once. And position
# 4,096, the first that needs the long table, does not ask for it and finds that table's row of position 0 in its place: the token
# is not turned at all.
#
# Run with SGLang's class (torch 2.13.0, CPU): 96 channels, short factors of 1, long ones from 1 to 64, as these models' are.
#
# Seen:
#   a query at 1,000, alone: 17.2% of its attention on the token that it looks for
#   a query at 1,000, beside a request at 3,000: 17.2%
#   a query at 1,000, beside a request at 5,000: 0.5%
#   a prompt of 6,000 at once and in chunks of 4,096: key 2,000 83 degrees apart
#   a token at 4,095 turned by 74 degrees, at 4,096 by 0, at 4,097 by 57

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile numpy==2.3.5
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23

cat >"$dir/case.py" <<'PY'
import ast
import math
import sys
from pathlib import Path
from typing import List, Optional, Tuple

import torch
from torch import nn

folder = Path(sys.argv[1]) / "sglang/srt/layers/rotary_embedding"
names = {"torch": torch, "nn": nn, "math": math, "List": List, "Optional": Optional, "Tuple": Tuple}
# The class and what it calls, out of modules that need a GPU's packages.
for file, wanted in (("utils.py", "rotate_neox"), ("rope_variant.py", "Phi3LongRoPEScaledRotaryEmbedding")):
    (node,) = [node for node in ast.parse((folder / file).read_text()).body if getattr(node, "name", None) == wanted]
    exec(compile(ast.Module([node], []), file, "exec"), names)

CHANNELS, SHORT, LONG = 96, 4096, 131072
short_factors, long_factors = torch.ones(CHANNELS // 2).tolist(), torch.linspace(1, 64, CHANNELS // 2).tolist()
rope = names["Phi3LongRoPEScaledRotaryEmbedding"](
    CHANNELS, CHANNELS, LONG, SHORT, 10000, True, torch.float32, short_factors, long_factors
)


def turned(vectors, positions):
    """(tokens, channels): what one forward of these tokens makes of them."""
    return rope(torch.as_tensor(positions), vectors, vectors)[0]


def angle(a, b):
    """In degrees."""
    return math.degrees(math.acos(min(1.0, float(torch.nn.functional.cosine_similarity(a, b, dim=0)))))


generator = torch.Generator().manual_seed(0)
keys = torch.randn(6000, CHANNELS, generator=generator)
query = keys[900].clone()  # looks for the token at position 900
cached = turned(keys[:1000], range(1000))
found = []
for beside in (None, 3000, 5000):
    batch = [1000] if beside is None else [1000, beside]
    rows = turned(query.expand(len(batch), CHANNELS), batch)
    found.append(float((cached @ rows[0] / CHANNELS**0.5).softmax(0)[900]))
    who = "alone" if beside is None else f"beside a request at {beside:,}"
    what = " of its attention on the token that it looks for" if beside is None else ""
    print(f"a query at 1,000, {who}: {found[-1]:.1%}{what}")
at_once, chunk = turned(keys, range(6000)), turned(keys[:SHORT], range(SHORT))
apart = angle(at_once[2000], chunk[2000])
print(f"a prompt of 6,000 at once and in chunks of 4,096: key 2,000 {apart:.0f} degrees apart")
before, first, after = (angle(turned(query[None], [position])[0], query) for position in (SHORT - 1, SHORT, SHORT + 1))
print(f"a token at 4,095 turned by {before:.0f} degrees, at 4,096 by {first:.0f}, at 4,097 by {after:.0f}")
assert found[0] == found[1] > 10 * found[2] and apart > 20 and first < 0.1 < 20 < min(before, after)
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
