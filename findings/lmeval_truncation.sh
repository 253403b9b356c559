#!/bin/sh
# lm-eval 0.4.13, model local-completions with a tokenizer: prompts to generate from lose their beginning where they have more than
# 2,048 tokens with the answer, whatever the server takes, and nothing is said. Its `max_length` is 2,048 unless model_args say
# otherwise. The warning "Some contexts exceeded ... They were left truncated" is there, but asks after the cut whether something is
# too long. In a long document that is most of it: scores are those of its end. `tokenized_requests=False` sends prompts whole.
#
# Seen:
#   a prompt of 6001 tokens: 1983 arrived, from token 4018 on; warnings: 0
#   with tokenized_requests=False: 6001 arrived; warnings: 0

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile transformers==5.19.0
"$python" -m pip install --quiet --no-compile 'lm-eval[api]==0.4.13'

cat >"$dir/case.py" <<'PY'
import json
import logging
import pathlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import lm_eval
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = pathlib.Path(sys.argv[1])
words = [f"w{number}" for number in range(6000)] + ["end"]
split = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "[EOS]", *words])}, unk_token="[UNK]"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=split, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder / "tokenizer")
(folder / "task").mkdir()
(folder / "task" / "data.jsonl").write_text(json.dumps({"text": " ".join(words), "answer": "x"}) + "\n")
(folder / "task" / "long.yaml").write_text(
    f"task: long\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/task/data.jsonl}}}}\n"
    "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {max_gen_toks: 64, until: ['.']}\nmetric_list: [{metric: exact_match}]\n"
)
prompts = []


class Completions(BaseHTTPRequestHandler):
    """Takes a prompt of any length."""

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        prompts.extend([given] if isinstance(given, str) else given)
        body = json.dumps({"choices": [{"index": 0, "text": "x"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Said(logging.Handler):
    """Counts what is said of the prompt's length."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record):
        self.count += "truncated" in record.getMessage()


server = HTTPServer(("127.0.0.1", 0), Completions)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1/completions"


def sent(**more):
    """The prompt as it arrived, and how many warnings spoke of it."""
    prompts.clear()
    said = Said()
    logging.getLogger("lm_eval").addHandler(said)
    arguments = {"model": "m", "base_url": url, "tokenizer": str(folder / "tokenizer"), **more}
    manager = TaskManager(include_path=str(folder / "task"))
    lm_eval.simple_evaluate("local-completions", arguments, ["long"], task_manager=manager, bootstrap_iters=0)
    (prompt,) = prompts
    return prompt, said.count


cut, warnings = sent()
print(f"a prompt of {len(words)} tokens: {len(cut)} arrived, from token {cut[0] - 2} on; warnings: {warnings}")
assert len(cut) < 2048 and cut[-1] == len(words) + 1 and warnings == 0
text, warnings = sent(tokenized_requests=False)
print(f"with tokenized_requests=False: {len(text.split())} arrived; warnings: {warnings}")
assert text.split() == words
PY
"$python" -W ignore "$dir/case.py" "$dir" 2>"$dir/log" || { tail -20 "$dir/log"; exit 1; }
