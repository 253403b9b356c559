#!/bin/sh
# SGLang 0.5.23: a stop string is not seen where the model wrote it in more tokens than its tokenizer would. What is searched is not
# the text but its last tokens, one more than the stop string itself has when it is encoded. Sampled text comes in smaller pieces
# now and then, and then the answer has the stop string in it and goes on to max_tokens.
#
# Run with SGLang's code for a request's end, and a tokenizer of bytes and four merges (tokenizers 0.23.3).
#
# Seen:
#   stop "end"  a end b      stopped after "aend"
#   stop "end"  a e nd b     stopped after "aend"
#   stop "end"  a e n d b    not stopped: "aendb"

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile tokenizers==0.23.3
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23

cat >"$dir/case.py" <<'PY'
import ast
import sys
from pathlib import Path
from typing import Optional

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

srt = Path(sys.argv[1]) / "sglang/srt"


def method(file, name, **names):
    """A method out of a module that needs more than is installed here."""
    for node in ast.walk(ast.parse((srt / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            names["Optional"] = Optional
            exec(compile(ast.Module([node], []), file, "exec"), names)
            return names[name]
    raise SystemExit(f"{file} has no {name}")


class Parameters:
    """What SamplingParams knows of stop strings."""

    normalize = method(
        "sampling/sampling_params.py", "normalize", MAX_STOP_COUNT=32, raise_if_tokenizer_required=lambda *of: None
    )

    def __init__(self, stop):
        self.stop_strs, self.stop_regex_strs, self.min_new_tokens = stop, None, 0


class Request:
    """What of a request finds its end."""

    decoded_text, finished_len = "", None
    _stop_match_tail_len = method("managers/schedule_batch.py", "_stop_match_tail_len")
    tail_str = method("managers/schedule_batch.py", "tail_str")
    _locate_str_stop_finished_len = method("managers/schedule_batch.py", "_locate_str_stop_finished_len")
    _check_str_based_finish = method("managers/schedule_batch.py", "_check_str_based_finish", FINISH_MATCHED_STR=lambda matched: matched)

    def __init__(self, stop):
        self.tokenizer, self.output_ids, self.sampling_params = Tokens(), [], Parameters(stop)
        self.sampling_params.normalize(self.tokenizer)


letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("i", "m"), ("n", "d"), ("e", "nd"), ("e", "n")]
vocabulary = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
raw = Tokenizer(models.BPE(vocabulary, merges))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()


class Tokens:
    """As transformers' tokenizers encode and decode."""

    def encode(self, text, add_special_tokens=True):
        return raw.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        return raw.decode(ids, skip_special_tokens=False)


def answer(stop, pieces):
    """The text that a model wrote in these tokens, and whether it was stopped."""
    request = Request(stop)
    for piece in pieces:
        request.output_ids.append(raw.token_to_id(piece))
        if request._check_str_based_finish(1):
            return request.tokenizer.decode(request.output_ids), True
    return request.tokenizer.decode(request.output_ids), False


CASES = [
    ("end", "a end b", ("aend", True)),
    ("end", "a e nd b", ("aend", True)),
    ("end", "a e n d b", ("aendb", False)),
]
for stop, pieces, expected in CASES:
    text, stopped = answer(stop, pieces.split())
    quoted = f'"{stop}"'
    print(f'stop {quoted:6} {pieces:12} {"stopped after" if stopped else "not stopped:"} "{text}"')
    assert (text, stopped) == expected
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
