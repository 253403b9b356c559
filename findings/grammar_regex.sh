#!/bin/sh
# xgrammar 0.2.7 and llguidance 1.9.1, two grammar backends of SGLang: a request's `regex` is read in another dialect than
# Python's, in which it was tried, and it depends on --grammar-backend in which. By xgrammar, the default,
# - `.` is any character, a newline too: "Reason: .+\nAnswer: (yes|no)" takes as many lines and answers as the model likes to
#   write.
# - \A and \Z are the letters A and Z: of \A(yes|no)\Z the only texts are AyesZ and AnoZ, where re allows yes and no. (^ and $
#   are right.) It says so in the server's log, once for a regex, and the request gets 200.
# - flags and {,3} are refused.
# llguidance reads Rust's dialect: `.` as in re, [[:alpha:]] a class, \Z refused. So an answer that was made by a regex need not
# match it, and moving to the other backend changes what may be said.
#
# Seen:
#   Reason: .+\nAnswer: (yes|no)   'Reason: a\nAnswer: no\nAnswer: yes'   re False, xgrammar True, llguidance False
#   \A(yes|no)\Z                   'yes'                                  re True, xgrammar False, llguidance refused
#   \A(yes|no)\Z                   'AyesZ'                                re False, xgrammar True, llguidance refused
#   ^(yes|no)$                     'yes'                                  re True, xgrammar True, llguidance True
#   (?i)yes                        'Yes'                                  re True, xgrammar refused, llguidance True
#   \d{,3}                         '12'                                   re True, xgrammar refused, llguidance refused
#   [[:alpha:]]+                   'ab'                                   re False, xgrammar False, llguidance True
#   [[:alpha:]]+                   ':]'                                   re True, xgrammar True, llguidance False

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
import re
import warnings

import llguidance
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

LINES = r"Reason: .+\nAnswer: (yes|no)"
CASES = [  # regex, text, by re, by xgrammar, by llguidance
    (LINES, "Reason: a\nAnswer: no\nAnswer: yes", False, True, False),
    (r"\A(yes|no)\Z", "yes", True, False, "refused"),
    (r"\A(yes|no)\Z", "AyesZ", False, True, "refused"),
    (r"^(yes|no)$", "yes", True, True, True),
    (r"(?i)yes", "Yes", True, "refused", True),
    (r"\d{,3}", "12", True, "refused", "refused"),
    (r"[[:alpha:]]+", "ab", False, False, True),
    (r"[[:alpha:]]+", ":]", True, True, False),
]
tokenizer = llguidance.LLTokenizer("byte")
warnings.simplefilter("ignore")  # re has one about [[


def by_xgrammar(regex, text):
    try:
        grammar = xgrammar.Grammar.from_regex(regex)
    except RuntimeError:
        return "refused"
    return _is_grammar_accept_string(grammar, text)


def by_llguidance(regex, text):
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(regex))
    if matcher.is_error():
        return "refused"
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


for regex, text, *expected in CASES:
    seen = [re.fullmatch(regex, text) is not None, by_xgrammar(regex, text), by_llguidance(regex, text)]
    print(f"{regex:30} {text!r:38} re {seen[0]}, xgrammar {seen[1]}, llguidance {seen[2]}")
    assert seen == expected, (regex, text, seen)
PY
"$python" "$dir/case.py" 2>"$dir/stderr" || { cat "$dir/stderr" >&2; exit 1; }
grep -q "'.Z' is not recognized" "$dir/stderr"
