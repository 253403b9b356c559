#!/bin/sh
# requests 2.34.2: `iter_lines()`, with which many a client reads a stream of events, takes time that grows with the square of a
# line's length. It reads 512 bytes at a time, and joins and splits anew all of the line that it has so far. Tokens are short,
# but the last event of an answer need not be: log-probabilities, hidden states or what else a server adds to it are megabytes in
# one line. With `chunk_size=1 << 20` requests needs milliseconds, as httpx 0.28.1 does, whose `iter_lines` keeps the parts.
#
# Seen (seconds of the reading thread on a CPU; yours differ, the ratios hardly):
#   1 MB: iter_lines() 0.536, iter_lines(chunk_size=1 << 20) 0.0036, httpx 0.0046
#   4 MB: iter_lines() 8.19, iter_lines(chunk_size=1 << 20) 0.016, httpx 0.0099

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile requests==2.34.2 urllib3==2.8.0 httpx==0.28.1

cat >"$dir/case.py" <<'PY'
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import requests


class Events(BaseHTTPRequestHandler):
    """Two short events and a long one of as many megabytes as the path says, each a chunk, as servers send them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for size in (10, 10, int(self.path[1:]) << 20):
            event = f"data: {json.dumps({'text': 'x' * size})}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Events)
threading.Thread(target=server.serve_forever, daemon=True).start()


def by_requests(url, **more):
    with requests.get(url, stream=True) as answer:
        return [line for line in answer.iter_lines(**more) if line]


client = httpx.Client(trust_env=False)


def by_httpx(url):
    with client.stream("GET", url) as answer:
        return [line.encode() for line in answer.iter_lines() if line]


def timed(read, *arguments, **more):
    """What was read, and this thread's seconds."""
    begin = time.thread_time()
    return read(*arguments, **more), time.thread_time() - begin


took = {}
for read in (by_requests, by_httpx):
    read(f"http://127.0.0.1:{server.server_port}/0")
for megabytes in (1, 4):
    url = f"http://127.0.0.1:{server.server_port}/{megabytes}"
    lines, slow = timed(by_requests, url)
    same, fast = timed(by_requests, url, chunk_size=1 << 20)
    again, other = timed(by_httpx, url)
    assert lines == same == again and [len(line) for line in lines] == [28, 28, 18 + (megabytes << 20)]
    print(f"{megabytes} MB: iter_lines() {slow:.3g}, iter_lines(chunk_size=1 << 20) {fast:.2g}, httpx {other:.2g}")
    took[megabytes] = slow
    assert slow > 20 * fast and slow > 20 * other
assert took[4] > 8 * took[1]
PY
"$python" "$dir/case.py"
