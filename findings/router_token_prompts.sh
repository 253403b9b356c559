#!/bin/sh
# smg 1.13.0, SGLang's router: POST /v1/completions takes a prompt as text or a list of texts. A prompt of token ids, or a list of
# such, which OpenAI's API and a SGLang server take, is answered with 400 and never reaches a server. lm-eval's local-completions
# sends ids unless it is told tokenized_requests=False, so an evaluation that runs against a server does not run behind its
# router. /generate takes ids.
#
# Seen:
#   /v1/completions, a text: 200, two texts: 200, ids: 400, two lists of ids: 400
#   /generate, ids: 200

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
    prompts = {"a text": "hi", "two texts": ["hi", "ho"], "ids": [5, 6, 7], "two lists of ids": [[5, 6], [7, 8]]}
    found = {}
    for name, prompt in prompts.items():
        found[name] = status(f"{routed}/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 4})
        assert len(received) == (found[name] == 200)
    print("/v1/completions,", ", ".join(f"{name}: {code}" for name, code in found.items()))
    ids = status(f"{routed}/generate", {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}})
    print(f"/generate, ids: {ids}")
    assert list(found.values()) == [200, 200, 400, 400] and ids == 200 and received[0]["input_ids"] == [5, 6, 7]
finally:
    router.terminate()
    router.wait(30)
PY
"$dir/smg/bin/python" "$dir/case.py" "$dir"
