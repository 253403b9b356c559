#!/bin/sh
# xgrammar 0.2.7 and llguidance 1.9.1, two grammar backends that SGLang 0.5.23 offers for one and the same JSON schema: they
# allow different texts, and xgrammar allows some that the schema forbids. It reads `pattern`, and the patterns of
# patternProperties, as if they had to cover the whole string, so that "^x" allows the one key x. It drops maxLength beside a
# pattern, multipleOf of a number and an allOf of two, `not` and uniqueItems, with a line on stderr at most. llguidance keeps
# to the first three and refuses the last two. Both want properties in the schema's order. SGLang looks before it asks xgrammar
# and refuses `not`, uniqueItems, multipleOf and a pattern with a length, but neither the allOf nor the patterns.
#
# Seen:
#   {"type": "string", "pattern": "b+"}
#       "abbc"               valid True, xgrammar False, llguidance True
#   {"type": "object", "patternProperties": {"^x": {"type": "integer"}}}
#       {"xa":1}             valid True, xgrammar False, llguidance True
#   {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}
#       "abcd"               valid False, xgrammar True, llguidance False
#   {"type": "number", "multipleOf": 5}
#       7                    valid False, xgrammar True, llguidance False
#   {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}
#       9                    valid False, xgrammar True, llguidance False
#   {"not": {"type": "string"}}
#       "a"                  valid False, xgrammar True, llguidance refused
#   {"type": "array", "items": {"type": "integer"}, "uniqueItems": true}
#       [1,1]                valid False, xgrammar True, llguidance refused
#   {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "re
#       {"b":null,"a":null}  valid True, xgrammar False, llguidance False

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile xgrammar==0.2.7 llguidance==1.9.1 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import json

import llguidance
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

CASES = [  # schema, text, is the text valid, xgrammar, llguidance
    ({"type": "string", "pattern": "b+"}, '"abbc"', True, False, True),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, '{"xa":1}', True, False, True),
    ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, '"abcd"', False, True, False),
    ({"type": "number", "multipleOf": 5}, "7", False, True, False),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, "9", False, True, False),
    ({"not": {"type": "string"}}, '"a"', False, True, "refused"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1,1]", False, True, "refused"),
    (
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "required": ["a", "b"]},
        '{"b":null,"a":null}',
        True,
        False,
        False,
    ),
]
tokenizer = llguidance.LLTokenizer("byte")


def by_llguidance(schema, text):
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    if matcher.is_error():
        return "refused"
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


for schema, text, valid, *expected in CASES:
    # SGLang too leaves strict_mode at its default.
    grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema))
    seen = [_is_grammar_accept_string(grammar, text), by_llguidance(schema, text)]
    print(f"{json.dumps(schema)[:84]}\n    {text:20} valid {valid}, xgrammar {seen[0]}, llguidance {seen[1]}")
    assert seen == expected, (schema, seen)
PY
"$python" "$dir/case.py" 2>"$dir/stderr" || { cat "$dir/stderr" >&2; exit 1; }
