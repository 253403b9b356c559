#!/bin/sh
# transformers 5.24.0 saves a config.json in which the base and the scaling of rope are in `rope_parameters` alone. 4.57.6 reads
# it, keeps that key as one it does not know, and takes its defaults: base 10,000 and no scaling, without a word. So a checkpoint
# that was only loaded and saved again has other angles for every program that reads `rope_theta` and `rope_scaling`: short texts
# look nearly right, long ones do not. The other way round is well: 5.24.0 reads the old keys.
#
# Seen:
#   Qwen3Config: rope_theta 1000000.0 in the original, saved as rope_parameters; 4.57.6 reads 10000.0, warnings: 0
#   LlamaConfig: rope_theta 500000.0 in the original, saved as rope_parameters; 4.57.6 reads 10000.0, warnings: 0
#   LlamaConfig: rope_scaling llama3 in the original; 4.57.6 reads None

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/five"
"$dir/five/bin/python" -m pip install --quiet --no-compile transformers==5.24.0
"${PYTHON:-python3}" -m venv "$dir/four"
"$dir/four/bin/python" -m pip install --quiet --no-compile transformers==4.57.6

cat >"$dir/case.py" <<'PY'
import json
import pathlib
import sys

import transformers
from transformers import AutoConfig
from transformers.utils import logging

folder = pathlib.Path(sys.argv[1])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ORIGINALS = {  # the fields that the models' own config.json have
    "Qwen3Config": {"model_type": "qwen3", "rope_theta": 1000000.0, "rope_scaling": None},
    "LlamaConfig": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
}
logging.set_verbosity_warning()
if transformers.__version__.startswith("5."):
    for name, fields in ORIGINALS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields))
        config = AutoConfig.from_pretrained(folder / name)
        assert config.rope_parameters["rope_theta"] == fields["rope_theta"]
        config.save_pretrained(folder / name)
        saved = json.loads((folder / name / "config.json").read_text())
        assert saved["rope_parameters"]["rope_theta"] == fields["rope_theta"]
        assert "rope_theta" not in saved and "rope_scaling" not in saved
else:
    for name, fields in ORIGINALS.items():
        config, unread = AutoConfig.from_pretrained(folder / name, return_unused_kwargs=True)
        warned = len((folder / "stderr").read_text().splitlines())
        was = fields["rope_theta"]
        print(f"{name}: rope_theta {was} in the original, saved as rope_parameters; 4.57.6 reads {config.rope_theta}, warnings: {warned}")
        assert type(config).__name__ == name and config.rope_theta == 10000.0 and not unread and not warned
        assert config.rope_parameters["rope_theta"] == was  # kept, and asked by nobody
        if fields["rope_scaling"]:
            print(f"{name}: rope_scaling {fields['rope_scaling']['rope_type']} in the original; 4.57.6 reads {config.rope_scaling}")
        assert config.rope_scaling is None
PY
"$dir/five/bin/python" "$dir/case.py" "$dir" 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
# Transformers says on importing that there is no torch; what comes later is kept.
"$dir/four/bin/python" - "$dir" 2>"$dir/log" <<'PY' || { cat "$dir/log" "$dir/stderr" >&2; exit 1; }
import os
import runpy
import sys

import transformers  # noqa: F401

log = os.open(f"{sys.argv[1]}/stderr", os.O_WRONLY | os.O_CREAT)
os.dup2(log, 2)
runpy.run_path(f"{sys.argv[1]}/case.py")
PY
