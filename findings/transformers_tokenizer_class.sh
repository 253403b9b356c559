#!/bin/sh
# transformers 5.24.0: how a tokenizer.json cuts text before its merges counts only where tokenizer_config.json names no class that
# knows better. Qwen2Tokenizer takes vocabulary and merges from the file and cuts by its own rule, digits one by one; so do other
# classes of one model's. A checkpoint that took over Qwen's files with another rule (digits by three) gets other tokens than
# `tokenizers`, or 4.57.6, make of the same file, without a word. What is read back is the same text, so nothing but the ids shows
# it. Where LlamaTokenizer is named and the file is byte-level 5.24.0 looks, says so and reads the file; not so here. SGLang 0.5.23
# puts the file's rule back only where its type differs (read in its source).
#
# Seen:
#   tokenizers                         a 1234  ->  a Ġ 123 4
#   4.57.6, Qwen2TokenizerFast         a 1234  ->  a Ġ 123 4
#   5.24.0, Qwen2TokenizerFast         a 1234  ->  a Ġ 1 2 3 4
#   5.24.0, LlamaTokenizerFast         a 1234  ->  a Ġ 123 4
#   5.24.0, PreTrainedTokenizerFast    a 1234  ->  a Ġ 123 4

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
for version in 5.24.0 4.57.6; do
    "${PYTHON:-python3}" -m venv "$dir/$version"
    "$dir/$version/bin/python" -m pip install --quiet --no-compile "transformers==$version"
done

cat >"$dir/case.py" <<'PY'
import json
import pathlib
import sys

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = pathlib.Path(sys.argv[1]) / "model"
folder.mkdir(exist_ok=True)
TEXT = "a 1234"
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("1", "2"), ("12", "3")]
vocabulary = {token: number for number, token in enumerate(letters + ["".join(pair) for pair in merges])}
raw = Tokenizer(models.BPE(vocabulary, merges))
rule = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
raw.pre_tokenizer = pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
raw.decoder = decoders.ByteLevel()
raw.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def show(name, pieces):
    print(f"{name:34} {TEXT}  ->  {' '.join(pieces)}")
    return pieces


def loaded(tokenizer_class):
    """What AutoTokenizer makes of the file."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == TEXT
    return show(f"{transformers.__version__}, {tokenizer_class}", tokenizer.convert_ids_to_tokens(ids))


BY_FILE = ["a", "Ġ", "123", "4"]
if transformers.__version__.startswith("4."):
    assert show("tokenizers", raw.encode(TEXT).tokens) == BY_FILE
    assert loaded("Qwen2TokenizerFast") == BY_FILE
else:
    assert loaded("Qwen2TokenizerFast") == ["a", "Ġ", "1", "2", "3", "4"]
    said = (folder.parent / "log").read_text()
    assert "okenizer" not in said.replace("only tokenizers, configuration", ""), said
    assert loaded("LlamaTokenizerFast") == BY_FILE
    assert "`tokenizer_class` is `LlamaTokenizerFast`" in (folder.parent / "log").read_text()
    assert loaded("PreTrainedTokenizerFast") == BY_FILE
PY
for version in 4.57.6 5.24.0; do
    "$dir/$version/bin/python" "$dir/case.py" "$dir" 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
done
