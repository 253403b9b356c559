#!/bin/sh
# transformers 5.24.0 on a GGUF file (gguf 0.19.0): `tokenizer.ggml.pre` says how text is cut before merges, and a reader
# that does not know a name has the wrong tokens. Some names are followed (qwen2 takes digits one by one, llama-bpe up to
# three); others, smollm and deepseek-llm among them, get GPT-2's rule without an error, in which a number is one word.
# llama.cpp's rule for smollm takes digits one by one, so the same file gives a model other tokens in the two programs.
#
# Seen:
#   gpt-2          1234
#   smollm         1234
#   deepseek-llm   1234
#   llama-bpe      123 4
#   qwen2          1 2 3 4

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import sys

from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

folder = sys.argv[1]
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
seen = {}
for pre in ("gpt-2", "smollm", "deepseek-llm", "llama-bpe", "qwen2"):
    writer = GGUFWriter(f"{folder}/model.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*letters, "12", "123", "1234", "<s>"])
    writer.add_token_types([1] * 259 + [3])
    writer.add_token_merges(["1 2", "12 3", "123 4"])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(259)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    seen[pre] = tokenizer.tokenize("1234")
    print(f"{pre:14}", *seen[pre])
assert seen["gpt-2"] == seen["smollm"] == seen["deepseek-llm"] == ["1234"]
assert seen["llama-bpe"] == ["123", "4"]
assert seen["qwen2"] == ["1", "2", "3", "4"]
PY
"$python" "$dir/case.py" "$dir"
