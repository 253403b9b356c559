#!/bin/sh
# smg 1.13.0, SGLang's router, does not pass a request on as it came: it reads it into its own types and writes it anew. Top-level
# fields that it does not know survive, fields inside do not, and nobody is told: the answer is a 200. Of SGLang 0.5.23's
# sampling_params in POST /generate it drops logit_bias, stop_regex, stream_interval and spaces_between_special_tokens; of a chat's
# messages the `prefix` that asks to go on with the last one, and a tool's name. So a ban of a token holds on a server and not
# behind its router.
#
# Seen:
#   /generate: 200, without logit_bias, spaces_between_special_tokens, stop_regex, stream_interval
#   /v1/chat/completions: 200, messages without name, prefix
#   an unknown field at the top: kept

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/smg"
"$dir/smg/bin/python" -m pip install --quiet --no-compile smg==1.13.0

cat >"$dir/case.py" <<'PY'
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

folder = pathlib.Path(sys.argv[1])
ANSWERS = {
    "/health": {},
    "/v1/models": {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "sglang", "root": "m"}]},
    "/server_info": {"version": "0.5.23", "tp_size": 1, "dp_size": 1, "model_path": "/m", "served_model_name": "m"},
    "/model_info": {"model_path": "/m", "tokenizer_path": "/m", "is_generation": True},
}
ANSWERS["/get_server_info"], ANSWERS["/get_model_info"] = ANSWERS["/server_info"], ANSWERS["/model_info"]
received = []


class Worker(BaseHTTPRequestHandler):
    """As much of a server as the router asks for; keeps what it was sent."""

    protocol_version = "HTTP/1.1"

    def say(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.say(ANSWERS.get(path, {}), 200 if path in ANSWERS else 404)

    def do_POST(self):
        received.append(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))
        self.say({"id": "x", "created": 1, "model": "m", "choices": [], "text": "", "meta_info": {}})

    def log_message(self, *arguments):
        pass


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(url, body=None):
    """The status of an answer; after it, `received` has what the server got."""
    received.clear()
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=20) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


server = ThreadingHTTPServer(("127.0.0.1", 0), Worker)
threading.Thread(target=server.serve_forever, daemon=True).start()
direct, port = f"http://127.0.0.1:{server.server_port}", free_port()
routed = f"http://127.0.0.1:{port}"
arguments = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", direct]
log = (folder / "log").open("w")
router = subprocess.Popen([str(folder / "smg/bin/smg"), "launch", *arguments], stdout=log, stderr=log)
try:
    for _ in range(120):
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"{routed}/workers", timeout=20) as answer:
                if sum(worker["is_healthy"] for worker in json.load(answer)["workers"]) == 1:
                    break
        except OSError:
            continue
    else:
        sys.exit("the router did not find its server")
    sampling = {
        "max_new_tokens": 4,
        "stop": ["a"],
        "stop_token_ids": [3],
        "stop_regex": ["b+"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "min_new_tokens": 1,
        "n": 1,
        "regex": "x",
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
        "stream_interval": 4,
        "logit_bias": {"5": -100.0},
        "sampling_seed": 7,
        "custom_params": {"a": 1},
    }
    code = status(f"{routed}/generate", {"text": "hi", "sampling_params": sampling, "of_ours": 1})
    left = received[0]["sampling_params"]
    lost = sorted(set(sampling) - set(left))
    print(f"/generate: {code}, without {', '.join(lost)}")
    assert code == 200 and lost == ["logit_bias", "spaces_between_special_tokens", "stop_regex", "stream_interval"]
    assert all(left[name] == sampling[name] for name in left)
    kept = received[0].get("of_ours") == 1

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "t"},
        {"role": "assistant", "content": "It says", "prefix": True},
    ]
    code = status(f"{routed}/v1/chat/completions", {"model": "m", "messages": messages})
    pairs = list(zip(messages, received[0]["messages"], strict=True))
    lost = sorted({name for sent, got in pairs for name in set(sent) - set(got)})
    print(f"/v1/chat/completions: {code}, messages without {', '.join(lost)}")
    assert code == 200 and lost == ["name", "prefix"]
    print("an unknown field at the top:", "kept" if kept else "lost")
    assert kept
    status(f"{direct}/generate", {"text": "hi", "sampling_params": sampling})
    assert received[0]["sampling_params"] == sampling
finally:
    router.terminate()
    router.wait(30)
PY
"$dir/smg/bin/python" "$dir/case.py" "$dir"
