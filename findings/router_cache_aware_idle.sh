#!/bin/sh
# sglang-router 0.3.2, --policy cache_aware (its default), requests one after another: prompts that have nothing in common all go to
# one server, and the other stays idle. Its own documentation (`cache_threshold`) says that a prompt that matches little goes to the
# worker with the smallest tree. smg 1.13.0, its successor, spreads the same prompts.
#
# Seen, 40 prompts of 200 random numbers each, over two servers:
#   sglang-router 0.3.2: 40 and 0
#   smg 1.13.0: 21 and 19 (about)

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/router"
"$dir/router/bin/python" -m pip install --quiet --no-compile sglang-router==0.3.2
"${PYTHON:-python3}" -m venv "$dir/smg"
"$dir/smg/bin/python" -m pip install --quiet --no-compile smg==1.13.0

cat >"$dir/case.py" <<'PY'
import json
import pathlib
import random
import socket
import subprocess
import sys
import threading
import time
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


class Worker(BaseHTTPRequestHandler):
    """As much of a server as routers ask for."""

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
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        message = {"role": "assistant", "content": str(self.server.server_port)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.say({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage})

    def log_message(self, *arguments):
        pass


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def asked(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def shares(command):
    """How many of 40 prompts each of two servers got."""
    workers = [ThreadingHTTPServer(("127.0.0.1", 0), Worker) for _ in range(2)]
    for worker in workers:
        threading.Thread(target=worker.serve_forever, daemon=True).start()
    port = free_port()
    urls = [f"http://127.0.0.1:{worker.server_port}" for worker in workers]
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    arguments += ["--policy", "cache_aware", "--worker-urls", *urls]
    log = (folder / "log").open("w")
    router = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                if sum(worker["is_healthy"] for worker in asked(f"{url}/workers")["workers"]) == 2:
                    break
            except OSError:
                continue
        else:
            sys.exit("the router did not find its servers")
        numbers = random.Random(7)
        got = {}
        for _ in range(40):
            prompt = " ".join(str(numbers.random()) for _ in range(200))
            body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
            who = asked(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
            got[who] = got.get(who, 0) + 1
        return sorted((got.get(str(worker.server_port), 0) for worker in workers), reverse=True)
    finally:
        router.terminate()
        router.wait(30)


elder = shares([str(folder / "router/bin/sglang-router"), "launch"])
print(f"sglang-router 0.3.2: {elder[0]} and {elder[1]}")
younger = shares([str(folder / "smg/bin/smg"), "launch"])
print(f"smg 1.13.0: {younger[0]} and {younger[1]}")
assert elder == [40, 0]
assert younger[1] > 10
PY
"$dir/smg/bin/python" "$dir/case.py" "$dir"
