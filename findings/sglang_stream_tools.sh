#!/bin/sh
# SGLang 0.5.23, chat completions with tools and `stream`: the streamed answer is not the one that comes without `stream`. Each
# parser (--tool-call-parser) reads a text in two ways. The one for streams holds back what may become a call, and does not give it
# back when it was none, though the model calls nothing and the request only offers a tool. llama3: from a token on that begins with
# a brace, as in LaTeX or C, the rest of the answer never comes. pythonic (Llama 4): from a bracket on that is not closed. mistral:
# every "]" is missing, and the second call of a list comes as text. qwen25: behind a call of a function that was not offered the
# next call has the index of the one before, and who joins deltas by index has one call with two names and two JSON objects.
#
# Run with SGLang's parsers, on pieces as tokens are; single characters give the same.
#
# Seen:
#   llama3    whole     Half of it is \frac{1}{2}, so take 3.
#             streamed  Half of it is \frac
#   pythonic  whole     The interval [0, 1) has no greatest number.
#             streamed  The interval
#   mistral   whole     Set x[0] to [1, 2].
#             streamed  Set x[0 to [1, 2.
#   mistral   whole     weather {"city": "Oslo"} | add {"x": 2}
#             streamed  , {"name": "add", "arguments": {"x": 2}} | weather {"city": "Oslo"}
#   qwen25    whole     weather {"city": "Oslo"} | add {"x": 2}
#             streamed  , "arguments": {"x": 1}} | weatheradd {"city": "Oslo"}{"x": 2}

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile pydantic==2.14.4 orjson==3.13.0 partial-json-parser==0.2.1.1.post7
"$python" -m pip install --quiet --no-compile --no-deps sglang==0.5.23

cat >"$dir/case.py" <<'PY'
import importlib
import json
import logging
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

site = Path(sys.argv[1])
# The packages without what they import for servers; of the API's types the parsers need two names.
for name in ("sglang", "sglang.srt", "sglang.srt.function_call"):
    package = types.ModuleType(name)
    package.__path__ = [str(site / name.replace(".", "/"))]
    sys.modules[name] = package
for name in ("sglang.srt.entrypoints", "sglang.srt.entrypoints.openai", "sglang.srt.entrypoints.openai.protocol"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].Tool = sys.modules[name].ToolChoice = SimpleNamespace
logging.disable(logging.CRITICAL)

PARSERS = {
    "llama3": ("llama32_detector", "Llama32Detector"),
    "pythonic": ("pythonic_detector", "PythonicDetector"),
    "mistral": ("mistral_detector", "MistralDetector"),
    "qwen25": ("qwen25_detector", "Qwen25Detector"),
}
TOOLS = [SimpleNamespace(function=SimpleNamespace(name=name, parameters={}, strict=False)) for name in ("weather", "add")]


def parser(name):
    module, kind = PARSERS[name]
    return getattr(importlib.import_module(f"sglang.srt.function_call.{module}"), kind)()


def whole(name, text):
    """Content and calls of an answer without `stream`, as FunctionCallParser has them."""
    detector = parser(name)
    result = detector.detect_and_parse(text, TOOLS)
    if not result.calls and not detector.has_tool_call(text):
        return [text]
    return [result.normal_text, *(f"{call.name} {call.parameters}" for call in result.calls)]


def streamed(name, pieces):
    """The same, put together from the deltas of a stream."""
    detector, content, names, arguments = parser(name), "", {}, {}
    for result in [*(detector.parse_streaming_increment(piece, TOOLS) for piece in pieces), detector.finish(TOOLS)]:
        content += result.normal_text
        for call in result.calls:
            names[call.tool_index] = names.get(call.tool_index, "") + (call.name or "")
            arguments[call.tool_index] = arguments.get(call.tool_index, "") + call.parameters
    return [content, *(f"{names[index]} {arguments[index]}" for index in sorted(names))]


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


oslo, difference, total = call("weather", city="Oslo"), call("subtract", x=1), call("add", x=2)
CALLS = ['weather {"city": "Oslo"}', 'add {"x": 2}']
CASES = [  # parser, what the model wrote, the answer whole, the answer streamed
    ("llama3", r"Half of it is \frac{1}{2}, so take 3.", None, [r"Half of it is \frac"]),
    ("pythonic", "The interval [0, 1) has no greatest number.", None, ["The interval "]),
    ("mistral", "Set x[0] to [1, 2].", None, ["Set x[0 to [1, 2."]),
    ("mistral", f"[TOOL_CALLS] [{oslo}, {total}]", ["", *CALLS], [f", {total}", CALLS[0]]),
    (
        "qwen25",
        "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in (oslo, difference, total)),
        ["", *CALLS],
        [', "arguments": {"x": 1}}\n\n', 'weatheradd {"city": "Oslo"}{"x": 2}'],
    ),
]
for name, text, as_whole, as_stream in CASES:
    got = whole(name, text)
    by_tokens = streamed(name, re.findall(r"<[^<>]*>| ?\w+|.|\n", text))
    by_letters = streamed(name, list(text))
    print(f"{name:9} whole    ", " | ".join(part.strip() for part in got if part))
    print(f"{'':9} streamed ", " | ".join(part.strip() for part in by_tokens if part))
    assert got == (as_whole or [text]) and by_tokens == by_letters == as_stream, (got, by_tokens, by_letters)
PY
"$python" "$dir/case.py" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
