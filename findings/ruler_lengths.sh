#!/bin/sh
# lm-eval 0.4.13, its RULER tasks at max_seq_lengths [4096]: that is a bound, and prompts can be little more than half of it.
# Needles among needles are added 25 at a time, each a line with two UUIDs, and a step that does not fit is taken back whole.
# The common-words task reserves room for an example with its answer and then leaves the example out of the prompt, so it is
# asked without one. Scores are filed under "4096" all the same. Tokens here: one for a run of up to eight letters, one for any
# other character. With SmolLM2's tokenizer the prompts had 2,148 to 2,184 and 2,559 to 2,826 tokens.
#
# Seen:
#   niah_multikey_3  prompts of 2026 to 2105 tokens, the answer 128 at most
#   ruler_cwe        prompts of 2477 to 2663 tokens, the answer 120 at most
#                    with the example that room was made for: 0 of 100

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile transformers==5.19.0
"$python" -m pip install --quiet --no-compile 'lm-eval[ruler]==0.4.13'

cat >"$dir/case.py" <<'PY'
import contextlib
import io
import pathlib
import random
import sys

import nltk
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = pathlib.Path(sys.argv[1])
# The needle tasks fetch a sentence splitter that these do not need; a folder of its name stops that.
(folder / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
nltk.data.path.insert(0, str(folder / "nltk"))
from lm_eval.tasks import TaskManager  # noqa: E402

pieces = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
pieces.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]{1,8}|[^A-Za-z]"), "isolated")
PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]").save_pretrained(folder / "tokenizer")
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

manager = TaskManager(metadata={"tokenizer": str(folder / "tokenizer"), "max_seq_lengths": [4096]})
longest = {}
for name in ("niah_multikey_3", "ruler_cwe"):
    random.seed(0)
    np.random.seed(1234)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loaded = manager.load([name])
        task = loaded["tasks"][name]
        docs = list(task.eval_docs)[:100]
        prompts = [task.fewshot_context(doc, 0) for doc in docs]
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    longest[name] = max(lengths)
    answer = task.config.generation_kwargs["max_gen_toks"]
    print(f"{name:16} prompts of {min(lengths)} to {max(lengths)} tokens, the answer {answer} at most")
    if name == "ruler_cwe":
        with_example = sum(doc["input_example"] in prompt for doc, prompt in zip(docs, prompts, strict=True))
        print(f"{'':16} with the example that room was made for: {with_example} of {len(docs)}")
        assert with_example == 0
assert longest["niah_multikey_3"] < 0.6 * 4096
assert longest["ruler_cwe"] < 0.8 * 4096
PY
"$python" -W ignore "$dir/case.py" "$dir"
