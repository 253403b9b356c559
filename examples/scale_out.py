"""Two clusterkv servers behind SGLang's router: do sessions stay where their prefix and clusters are, and what if one dies?

    python examples/scale_out.py --model PATH [--router 'smg launch'] [--sessions 5] [--turns 3] [--one-server]

Starts both servers and the router (smg or sglang-router, from PyPI), plays sessions that each go on about a document of their
own, one request after another, first with requests dealt in turn, then with the cache-aware policy, and prints what was found
in the caches. Then it kills the server that clustered more and asks the last turn of every session again. With --one-server it
plays the same sessions against one server with --tp-size 2, one with --dp-size 2, and the latter behind the router, which then
knows its replicas. With --write FILE it puts what it printed between the marks in a page (docs/scaling.md has them).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sglang_clusterkv.tools.haystack import CHARS_PER_TOKEN, haystack

ROUTERS = (["smg", "launch"], ["sglang-router", "launch"])
POLICIES = ("round_robin", "cache_aware")
START_S = 900
HOST = "127.0.0.1"
HEALTH = "/health_generate"
# Servers take any name of a model; smg routes by it.
NAMED = ["--served-model-name", "clusterkv"]
BEGIN, END = "<!-- scale_out.py -->\n", "<!-- end -->\n"


class Counts(NamedTuple):
    """What the servers counted, summed over all of their ranks."""

    clustered: int
    reused: int


class Played(NamedTuple):
    """What came of some sessions.

    Attributes:
        answers: of each session's last turn.
        prompt_tokens: of all requests.
        cached_tokens: of those, found in a radix cache.
        counts: of the servers, meanwhile.
    """

    answers: list[str]
    prompt_tokens: int
    cached_tokens: int
    counts: Counts


class ScaleOutError(RuntimeError):
    """Something that the user can change; the message is one sentence with the fix."""


class Process:
    """A server or a router, with its log; it ends with the block that started it."""

    def __init__(self, name: str, command: Sequence[str], url: str, log: Path) -> None:
        self.name, self.url, self.log = name, url, log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def wait_until_ready(self, path: str) -> None:
        """Return once `path` answers with 200."""
        begin = time.monotonic()
        while time.monotonic() - begin < START_S and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(self.url + path, timeout=30) as answer:
                if answer.status == 200:
                    return
            time.sleep(1)
        raise ScaleOutError(f"{self.name} did not start: see {self.log}\n{self.log.read_text()[-2000:]}")

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@contextmanager
def running(name: str, command: Sequence[str], url: str, log: Path) -> Iterator[Process]:
    """A process, until the block ends."""
    process = Process(name, command, url, log)
    try:
        yield process
    finally:
        process.kill(signal.SIGTERM)


def server_command(model: Path, port: int, arguments: Sequence[str]) -> list[str]:
    """A clusterkv server; without an accelerator, on the CPU."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", HOST]
    return [
        *command,
        "--port",
        str(port),
        "--attention-backend",
        "clusterkv",
        "--enable-cache-report",
        *NAMED,
        *arguments,
    ]


def find_router(text: str | None) -> list[str]:
    """The command of a router: the one that was named, else the first that is installed."""
    if text:
        return shlex.split(text)
    for command in ROUTERS:
        if shutil.which(command[0]):
            return command
    raise ScaleOutError("no router is installed: pip install smg, in this environment or another, and pass --router")


def router_command(
    router: Sequence[str], policy: str, port: int, urls: Sequence[str], log: Path, more: Sequence[str] = ()
) -> list[str]:
    """A router over servers. It looks at their health every two seconds and tries a request that failed again elsewhere."""
    return [
        *router, "--host", HOST, "--port", str(port), "--policy", policy, "--worker-urls", *urls,
        "--prometheus-port", str(port + 1), "--health-check-interval-secs", "2", "--health-failure-threshold", "1",
        "--log-dir", str(log), *more,
    ]  # fmt: skip


def post(url: str, body: dict[str, Any] | None = None) -> Any:
    """A POST of JSON; the answer's JSON, or None where it is none."""
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=1800) as answer:
        text = answer.read()
    with suppress(ValueError):
        return json.loads(text)
    return None


def wait_for_workers(router: Process, count: int) -> None:
    """Return once a router knows so many servers to be well; it answers before that."""
    router.wait_until_ready("/health")
    for _ in range(120):
        with urllib.request.urlopen(f"{router.url}/workers", timeout=30) as answer:
            if sum(worker["is_healthy"] for worker in json.load(answer)["workers"]) == count:
                return
        time.sleep(0.5)
    raise ScaleOutError(f"the router found fewer than {count} servers: see {router.log}")


def counts_of(servers: Sequence[Process]) -> Counts:
    """The clusters' counts of servers."""
    clustered = reused = 0
    for server in servers:
        with urllib.request.urlopen(f"{server.url}/server_info", timeout=60) as answer:
            for state in json.load(answer)["internal_states"]:
                clustered += state["clusterkv"]["tokens_clustered"]
                reused += state["clusterkv"]["tokens_reused"]
    return Counts(clustered, reused)


def flush(servers: Sequence[Process]) -> None:
    """Empty the servers' caches, once they are idle."""
    for server in servers:
        for _ in range(60):
            with suppress(urllib.error.HTTPError):
                post(f"{server.url}/flush_cache")
                break
            time.sleep(0.5)


class Session:
    """One chat about a document of its own."""

    def __init__(self, number: int, tokens: int, answer_tokens: int) -> None:
        document = "".join(haystack(tokens * CHARS_PER_TOKEN, seed=number))
        self.messages = [{"role": "user", "content": f"Handbook {number}.\n{document}\nWhat is this about?"}]
        self.answer_tokens = answer_tokens

    def ask(self, url: str) -> tuple[str, int, int]:
        """The answer to its last message, the prompt's tokens, and how many of them were cached."""
        body = {"model": NAMED[1], "messages": self.messages, "temperature": 0, "max_tokens": self.answer_tokens}
        answer = post(f"{url}/v1/chat/completions", body)
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], cached

    def go_on(self, answer: str, turn: int) -> None:
        """The next question."""
        self.messages.append({"role": "assistant", "content": answer})
        self.messages.append({"role": "user", "content": f"And what does part {turn + 1} say?"})


def play(sessions: Sequence[Session], url: str, turns: int, servers: Sequence[Process]) -> Played:
    """All turns of all sessions, one request after another: a turn of each, then the next of each."""
    before = counts_of(servers)
    answers = [""] * len(sessions)
    prompt_tokens = cached_tokens = 0
    for turn in range(turns):
        for number, session in enumerate(sessions):
            answers[number], prompt, cached = session.ask(url)
            prompt_tokens, cached_tokens = prompt_tokens + prompt, cached_tokens + cached
            if turn + 1 < turns:
                session.go_on(answers[number], turn)
    after = counts_of(servers)
    counts = Counts(after.clustered - before.clustered, after.reused - before.reused)
    return Played(answers, prompt_tokens, cached_tokens, counts)


def line(name: str, played: Played) -> str:
    """A row of the table."""
    share = 100 * played.cached_tokens / played.prompt_tokens
    return (
        f"{name:30} {played.prompt_tokens:>9,} {played.cached_tokens:>9,} ({share:2.0f} %) "
        f"{played.counts.clustered:>10,} {played.counts.reused:>9,}"
    )


class Report:
    """What was printed: a table, and whether a death changed an answer."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """A line, at once."""
        self.lines.append(text)
        print(text, flush=True)

    def write(self, page: Path, command: str) -> None:
        """Put it, with the command, between the marks of a page.

        Raises ScaleOutError where the page has none.
        """
        head, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not begin or not end:
            raise ScaleOutError(f"{page} has no lines {BEGIN.strip()} and {END.strip()}: put them where the table goes")
        text = "\n".join(["```", f"$ {command}", *(line.rstrip() for line in self.lines), "```", ""])
        page.write_text(head + begin + text + end + tail, encoding="utf-8")


class Run:
    """Servers and routers of one command line, and the sessions that are played against them."""

    def __init__(self, args: argparse.Namespace, server_arguments: Sequence[str], report: Report) -> None:
        self.args, self.server_arguments, self.report = args, server_arguments, report
        self.router, self.logs = find_router(args.router), Path(tempfile.mkdtemp(prefix="scale-out-"))

    def sessions(self) -> list[Session]:
        """New ones."""
        return [Session(number, self.args.tokens, self.args.answer_tokens) for number in range(self.args.sessions)]

    @contextmanager
    def server(self, number: int, *more: str) -> Iterator[Process]:
        """A server on a port of its own."""
        url = f"http://{HOST}:{self.args.port + number}"
        command = server_command(self.args.model, self.args.port + number, [*self.server_arguments, *more])
        with running(f"server {number}", command, url, self.logs / f"server-{number}") as server:
            yield server

    @contextmanager
    def routed(
        self, number: int, policy: str, servers: Sequence[Process], workers: int, *more: str
    ) -> Iterator[Process]:
        """A router over servers, on a port of its own, once it knows all workers."""
        port = self.args.port + 4 + 2 * number
        urls = [server.url for server in servers]
        command = router_command(self.router, policy, port, urls, self.logs / f"{policy}-{number}", more)
        with running("the router", command, f"http://{HOST}:{port}", self.logs / f"router-{number}") as router:
            wait_for_workers(router, workers)
            yield router

    def two_servers(self) -> bool:
        """Both policies, and a death; whether it changed no answer."""
        with ExitStack() as stack:
            servers = [stack.enter_context(self.server(number)) for number in range(2)]
            for server in servers:
                server.wait_until_ready(HEALTH)
            for number, policy in enumerate(POLICIES):
                flush(servers)
                router = stack.enter_context(self.routed(number, policy, servers, len(servers)))
                sessions, before = self.sessions(), [counts_of([server]).clustered for server in servers]
                played = play(sessions, router.url, self.args.turns, servers)
                self.report.say(line(f"2 servers, {policy}", played))
            # The one that has more to lose.
            made = [counts_of([server]).clustered - was for server, was in zip(servers, before, strict=True)]
            servers.pop(made.index(max(made))).kill()
            again = play(sessions, router.url, 1, servers)
        self.report.say(line("after one died, last turns", again))
        same = sum(one == other for one, other in zip(played.answers, again.answers, strict=True))
        self.report.say(f"answers as before: {same} of {len(sessions)}")
        return same == len(sessions)

    def one_server(self) -> None:
        """With two ranks, with two replicas, and with these behind a router that knows both."""
        with self.server(2, "--tp-size", "2") as server:
            server.wait_until_ready(HEALTH)
            self.report.say(line("1 server, --tp-size 2", play(self.sessions(), server.url, self.args.turns, [server])))
        with self.server(3, "--dp-size", "2") as server:
            server.wait_until_ready(HEALTH)
            self.report.say(line("1 server, --dp-size 2", play(self.sessions(), server.url, self.args.turns, [server])))
            flush([server])
            with self.routed(2, "cache_aware", [server], 2, "--dp-aware") as router:
                played = play(self.sessions(), router.url, self.args.turns, [server])
            self.report.say(line("--dp-size 2, --dp-aware", played))


def shown(words: Sequence[str]) -> list[str]:
    """A command line's words without what names this machine."""
    left, rest = [], iter(words)
    for word in rest:
        name, is_joined, _ = word.partition("=")
        if name in ("--model", "--router", "--port", "--write"):
            if not is_joined:
                next(rest, None)
            left += ["--model", "MODEL"] if name == "--model" else []
        else:
            left.append(word)
    return left


def run(args: argparse.Namespace, server_arguments: Sequence[str]) -> int:
    """Everything; 0 where each request was answered and a death changed no answer."""
    report = Report()
    all_of_it = Run(args, server_arguments, report)
    print(f"logs in {all_of_it.logs}")
    report.say(f"{'':30} {'prompt':>9} {'cached':>16} {'clustered':>10} {'reused':>9}   tokens")
    same = all_of_it.two_servers()
    if args.one_server:
        all_of_it.one_server()
    if args.write:
        report.write(args.write, shlex.join(["python", "examples/scale_out.py", *shown(sys.argv[1:])]))
    return 0 if same else 1


def main() -> int:
    """The command line; what it does not know goes to both servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--router", metavar="COMMAND", help="of smg or sglang-router, default: the one that is installed"
    )
    parser.add_argument("--port", type=int, default=31200, help="the first of ten, default %(default)s")
    parser.add_argument("--sessions", type=int, default=5, help="an odd number, or two servers in turn keep them apart")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1200, help="of each document, default %(default)s")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--one-server", action="store_true", help="also one server with two ranks, or two replicas")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page with marks, for what was printed")
    args, server_arguments = parser.parse_known_args()
    try:
        return run(args, server_arguments)
    except (ScaleOutError, urllib.error.URLError) as error:
        print(f"scale_out: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
