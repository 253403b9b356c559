"""Start a real SGLang server for a benchmark or a test, talk to it, and stop it."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests

START_TIMEOUT_S = 900  # on two cores that start several
ANSWER_TIMEOUT_S = 1800  # a model of some billion parameters prefills a long prompt on one core
# Bytes that are read of a stream at once, if they are there: `iter_lines` of requests reads 512, and puts what it has of a line
# together anew each time, so a line of some megabytes (a trace) keeps a core busy for seconds.
MOST_READ = 1 << 20
CPU_FLAGS = ("--device", "cpu", "--dtype", "float32")


# Below those that Linux hands to outgoing connections, for a server binds its port a minute after it was chosen.
PORTS = range(20000, 32000)


def model_folder(text: str) -> Path:
    """An argument `--model`: a folder with a model."""
    path = Path(text).expanduser()
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{path} has no model: name a folder with its config.json, or make one with `sglang-clusterkv demo-model`"
        )
    return path


def free_port() -> int:
    """A port that nothing listens on, and that no outgoing connection is given either."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A running server; `log` is the file with what it printed, `process` its first process."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process = process

    def generate(self, prompt: str | list[int], tokens: int, **fields: Any) -> dict[str, Any]:
        """Greedy completion of a prompt (text or ids); the server's JSON, with output_ids.

        Waits half an hour, and two seconds more for each token.
        """
        key = "text" if isinstance(prompt, str) else "input_ids"
        body: dict[str, Any] = {
            key: prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
            **fields,
        }
        answer = requests.post(f"{self.url}/generate", json=body, timeout=ANSWER_TIMEOUT_S + 2 * tokens)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, prompt: list[int], tokens: int, **sampling_params: Any) -> list[float]:
        """Greedy completion; the time (time.perf_counter) of the request, then of each token's arrival.

        Raises:
            AssertionError: it was refused.
        """
        times = [time.perf_counter()]
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **sampling_params}
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        with requests.post(f"{self.url}/generate", json=body, stream=True, timeout=ANSWER_TIMEOUT_S) as answer:
            assert answer.status_code == 200, answer.text
            for line in answer.iter_lines(chunk_size=MOST_READ):
                assert not line.startswith(b'data: {"error"'), line.decode()
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    times.append(time.perf_counter())
        return times

    def counts(self) -> dict[str, Any]:
        """Our counters, once the server has nothing in flight."""
        return requests.get(f"{self.url}/server_info", timeout=60).json()["internal_states"][0]["clusterkv"]

    def flush(self) -> None:
        """Empty the radix cache."""
        for _ in range(20):
            if requests.post(f"{self.url}/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.5)
        raise AssertionError("the cache was not flushed: something still runs")


def ends_with_us() -> None:
    """Runs in the server's process: it ends when ours does, however that ends (Linux; its own children follow it)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def serve(
    model: Path,
    log: Path,
    *arguments: str,
    config: dict[str, Any] | None = None,
    backend: str = "clusterkv",
    environment: dict[str, str] | None = None,
    device_flags: Sequence[str] = CPU_FLAGS,
    python: str = sys.executable,
    folder: Path | None = None,
) -> Iterator[Server]:
    """`python -m sglang.launch_server`, on the CPU in float32 unless told otherwise, until the block ends.

    Args:
        model: its folder.
        log: file for what the server prints.
        arguments: more of the command line.
        config: for --clusterkv-config.
        backend: of attention.
        environment: more variables than this process has.
        device_flags: which device and dtype.
        python: of the environment that serves.
        folder: in which it starts, by default this process's.
    """
    port = free_port()
    command = [python, "-m", "sglang.launch_server", "--model-path", str(model), *device_flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--attention-backend", backend]
    if config is not None:
        command += ["--clusterkv-config", json.dumps(config)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {})
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=output,
            env=variables,
            cwd=folder,
            start_new_session=True,
            preexec_fn=ends_with_us,
        )
    try:
        server = Server(port, log, process)
        _wait(server, process)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's processes, where a test has not done so."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
            return


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < START_TIMEOUT_S:
        # SGLang stays up when it can't bind its port.
        if process.poll() is not None or "address already in use" in server.log.read_text():
            break
        try:
            if requests.get(f"{server.url}/health_generate", timeout=20).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-3000:]}")
