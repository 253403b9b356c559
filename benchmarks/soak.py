"""Mixed traffic for half an hour: does the server's memory grow, do its tokens become slower?

    python -m benchmarks.soak [--minutes 30] [--model tiny|demo] [--threads 6]

New prompts, branches of shared prefixes, chats and aborts keep a server busy. Every few seconds the resident memory of its
processes is read, and one request of always the same length is timed. After a fifth of the time, in which pools and caches
fill, straight lines are fitted to both. Prints their slopes with a 95 % interval and exits with 1 where one is not flat:
its interval lies above zero and the rise over the measured time is more than 3 % (memory) or 15 % (time per token; other
programs on the machine show there). The interval is that of least squares; samples that follow each other are alike, so
it is somewhat too narrow, which is why a rise must also be large.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
from tqdm import tqdm

from benchmarks.servers import Server, serve
from sglang_clusterkv.tools.demo_model import default_out
from tests.support.tiny_model import tiny_model
from tests.support.traffic import Request, prompt

WARM_UP_SHARE = 0.2
SAMPLE_EVERY_S = 3.0
PROBE_TOKENS = 24
LARGEST_RISE = {"memory": 0.03, "time per token": 0.15}


class Size(NamedTuple):
    """How large requests are for a model, in tokens."""

    longest_prompt: int
    longest_answer: int
    probe: int
    pool: int
    config: dict[str, int]


SIZES = {
    "tiny": Size(1800, 120, 960, 24000, {"budget_tokens": 512, "candidate_tokens": 4096, "segment_tokens": 256}),
    "demo": Size(600, 30, 400, 12000, {"budget_tokens": 128, "candidate_tokens": 512, "segment_tokens": 256}),
}


class Line(NamedTuple):
    """A straight line through samples."""

    mean: float
    slope: float  # per second
    half: float  # half of the 95 % interval of the slope


def fit(times_s: list[float], values: list[float]) -> Line:
    """Least squares; the slope's interval by Student's t, its quantile by Cornish and Fisher's expansion."""
    count = len(times_s)
    assert count >= 5, f"{count} samples are too few: let it run longer"
    freedom = count - 2
    slope, begin = statistics.linear_regression(times_s, values)
    rest = sum((v - begin - slope * t) ** 2 for t, v in zip(times_s, values, strict=True))
    spread = sum((t - statistics.fmean(times_s)) ** 2 for t in times_s)
    z = statistics.NormalDist().inv_cdf(0.975)
    quantile = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return Line(statistics.fmean(values), slope, quantile * math.sqrt(rest / freedom / spread))


def is_flat(line: Line, measured_s: float, largest_rise: float) -> bool:
    """Whether the samples do not rise, or by little."""
    return line.slope - line.half <= 0 or line.slope * measured_s <= largest_rise * line.mean


class Traffic:
    """Threads that ask until told to end.

    Args:
        server: that gets the requests.
        size: of the requests.
        threads: requests at a time.
    """

    def __init__(self, server: Server, size: Size, threads: int) -> None:
        self._server, self._size = server, size
        self._end = threading.Event()
        self._trunks = [prompt(i, size.longest_prompt // 2) for i in range(6)]
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(threads)]
        self.requests = self.aborts = self.failures = 0

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait for the last answers."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, thread: int) -> None:
        generator, size = random.Random(thread), self._size
        chat: list[int] = []
        while not self._end.is_set():
            kind = generator.choice(["new", "branch", "chat", "abort"])
            ids = prompt(generator.getrandbits(40), generator.randrange(16, size.longest_prompt // 2))
            if kind in ("branch", "abort"):
                trunk = generator.choice(self._trunks)
                ids = trunk[: generator.randrange(16, len(trunk))] + ids
            elif kind == "chat":
                ids = (chat if len(chat) + len(ids) <= size.longest_prompt else []) + ids
            request = Request(self._server, ids, generator.randrange(1, size.longest_answer))
            if kind == "abort":
                self._end.wait(generator.uniform(0, 0.5))
                request.abort()
            request.join()
            if kind == "chat":
                chat = ids + request.output_ids
            self.requests += 1
            self.aborts += request.was_aborted
            self.failures += request.status != 200


def resident_mb(server: Server) -> float:
    """Resident memory of the server's processes; pages that several share count for each."""
    first = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in [first, *first.children(recursive=True)]) / 1e6


def probe_ms(server: Server, size: Size, number: int) -> float:
    """Median time between tokens of a request that is like every other probe, and new to the cache."""
    times = server.stream(prompt(10**9 + number, size.probe), PROBE_TOKENS)
    return 1000 * statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))


def soak(server: Server, size: Size, seconds: float, threads: int) -> bool:
    """Traffic and samples for so long; prints the lines and says whether all are flat."""
    traffic = Traffic(server, size, threads)
    samples: list[tuple[float, float, float]] = []
    traffic.start()
    begin = time.monotonic()
    with tqdm(total=round(seconds), unit="s") as bar:
        while (now := time.monotonic() - begin) < seconds:
            samples.append((now, resident_mb(server), probe_ms(server, size, len(samples))))
            _, memory, token = samples[-1]
            bar.set_postfix_str(f"{memory:.0f} MB, {token:.1f} ms/token, {traffic.requests} requests")
            time.sleep(max(0.0, SAMPLE_EVERY_S * len(samples) - (time.monotonic() - begin)))
            bar.update(min(round(seconds), round(time.monotonic() - begin)) - bar.n)
    traffic.end()
    measured = [sample for sample in samples if sample[0] >= WARM_UP_SHARE * seconds]
    times_s = [sample[0] for sample in measured]
    lasted_s = times_s[-1] - times_s[0]
    print(f"{traffic.requests} requests, {traffic.aborts} aborted, {traffic.failures} failed; {len(measured)} samples")
    flat = traffic.failures == 0
    for column, (name, unit) in enumerate((("memory", "MB"), ("time per token", "ms")), 1):
        line = fit(times_s, [sample[column] for sample in measured])
        verdict = is_flat(line, lasted_s, LARGEST_RISE[name])
        flat = flat and verdict
        hour = [3600 * value for value in (line.slope, line.slope - line.half, line.slope + line.half)]
        print(
            f"{name}: mean {line.mean:.1f} {unit}, {hour[0]:+.2f} {unit} per hour (95 %: {hour[1]:+.2f} to {hour[2]:+.2f}), "
            f"{100 * line.slope * lasted_s / line.mean:+.2f} % in the measured {lasted_s / 60:.1f} minutes: "
            f"{'flat' if verdict else 'NOT FLAT'}"
        )
    return flat


def main() -> None:
    """Start a server, let it soak, and exit with 1 where something rises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", choices=list(SIZES), default="tiny")
    parser.add_argument("--threads", type=int, default=6)
    args = parser.parse_args()
    size = SIZES[args.model]
    model = tiny_model() if args.model == "tiny" else default_out()
    log = Path(tempfile.mkdtemp()) / "server.log"
    print(f"starting a server on {model}; its log: {log}", flush=True)
    arguments = ["--chunked-prefill-size", "1024", "--max-total-tokens", str(size.pool), "--max-running-requests", "8"]
    with serve(model, log, *arguments, config=size.config) as server:
        flat = soak(server, size, 60 * args.minutes, args.threads)
        counts = server.counts()
        sound = counts["running"] == counts["build_conflicts"] == 0 and not counts["faults"]
        print(
            f"at the end: {counts['running']} running, {counts['build_conflicts']} conflicts, faults {counts['faults']}"
        )
    sys.exit(0 if flat and sound else 1)


if __name__ == "__main__":
    main()
