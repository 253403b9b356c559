"""The examples and `sglang-clusterkv needle`, small, as a user starts them: against one real server, then without one.

Red when: one of them fails or leaves a process, a document that several read is clustered again, a branch or a later question
does not find its clusters, what is printed differs from the server's counts, or the needle table has an empty cell.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.servers import Server, free_port
from sglang_clusterkv.tools.haystack import FACTS
from tests.support.servers import DEMO_CONFIG

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
# Of the small documents: sinks, window and the question are not clustered. Two copies would have twice as many.
ONE_COPY = range(1300, 1700)


def run(command: list[str | Path], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a session of its own, in which nothing may be left."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        output, error = process.communicate(timeout=600)
    deadline_s = time.monotonic() + 10
    while (left := running_in_session(process.pid)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert not left, left
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def running_in_session(session: int) -> list[str]:
    """Command lines of a session's processes. Those that ended and were not reaped, which is for pid 1 to do, don't run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def example(name: str, *arguments: str) -> str:
    """What an example prints."""
    done = run([sys.executable, ROOT / "examples" / name, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def facts_found(output: str) -> int:
    """Answers, on the line below their question, that have the fact."""
    lines = output.splitlines()
    found = 0
    for fact in FACTS:
        (at,) = (i for i, line in enumerate(lines) if line.startswith(fact.question))
        found += fact.answer in lines[at + 1]
    return found


def numbers(output: str, name: str) -> list[int]:
    """The numbers of the line that begins with a name."""
    (line,) = (line for line in output.splitlines() if line.startswith(name))
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def grew(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    return after[name] - before[name]


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    demo_server.flush()
    return demo_server


class TestAgainstAServer:
    def test_a_frontend_program_clusters_its_document_once(self, server: Server) -> None:
        before = server.counts()
        output = example("frontend.py", "--small", "--base-url", server.url)
        after = server.counts()
        for name in ("tokens_clustered", "tokens_reused", "splits"):
            assert numbers(output, name) == [grew(before, after, name)]
        # A question whose window begins earlier than those before it cuts the document's last segment there.
        (clustered,), (splits,) = numbers(output, "tokens_clustered"), numbers(output, "splits")
        assert splits <= 3 and clustered in range(
            ONE_COPY.start, ONE_COPY.stop + splits * DEMO_CONFIG["segment_tokens"]
        )
        # The first branch finds what the document's own request clustered; two branches and the choice find all of it.
        (reused,) = numbers(output, "tokens_reused")
        assert 3 * ONE_COPY.start < reused < 4 * clustered
        assert facts_found(output) >= 3, output

    def test_agents_share_the_document_and_the_turn(self, server: Server) -> None:
        before = server.counts()
        output = example("agent.py", "--small", "--base-url", f"{server.url}/v1")
        rows = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines() if re.match(r"\s+[AB]\s+\d", line)]
        # agent, turn, prompt, cached, clustered, reused, ...
        assert [row[:2] for row in rows] == [["A", "1"], ["A", "2"], ["A", "3"], ["B", "2"], ["B", "3"]]
        counted = [[int(cell.replace(",", "")) for cell in row[2:6]] for row in rows]
        (_, _, document, reused), *later = counted
        assert document in ONE_COPY and reused == 0
        for prompt, cached, clustered, reused in later:
            assert cached >= prompt - 64 and reused >= document and clustered <= 128, rows
        assert sum(row[2] for row in counted) == grew(before, server.counts(), "tokens_clustered")
        assert int(re.findall(r"facts found: (\d) of 5", output)[0]) >= 3, output

    def test_needles_fill_the_table(self, server: Server, tmp_path: Path) -> None:
        before = server.counts()
        command: list[str | Path] = [
            Path(sys.executable).with_name("sglang-clusterkv"),
            "needle",
            "--base-url",
            server.url,
        ]
        done = run([*command, "--lengths", "600,1200,9000", "--depths", "2", "--out", "needles"], tmp_path)
        assert done.returncode == 0, done.stderr
        cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
        table = {name: rest for name, *rest in cells}
        assert table["depth"] == ["600", "1,200", "9,000"]
        for depth in ("0 %", "100 %"):
            assert len(table[depth]) == 3 and set(table[depth][:2]) <= {"0/1", "1/1"} and table[depth][2] == "-"
        assert "4/4" in done.stderr and "9,000 tokens are left out" in done.stderr
        result = json.loads((tmp_path / "needles" / "needle.json").read_text())
        assert result["asked"] == 4 and result["found"] >= 2, result["answers"]
        for answer in result["answers"]:
            assert answer["prompt_tokens"] == pytest.approx(answer["length"], rel=0.06)
        assert (tmp_path / "needles" / "needle.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert grew(before, server.counts(), "sparse_steps") > 0

    def test_the_server_is_still_well(self, server: Server) -> None:
        assert "Traceback" not in server.log.read_text()
        assert server.counts()["running"] == 0


def test_an_engine_finds_in_its_batch_what_the_first_prompt_left() -> None:
    output = example("engine.py", "--small")
    alone, batch = numbers(output, "tokens_clustered")
    assert alone in ONE_COPY and batch <= alone / 2
    reused = numbers(output, "tokens_reused")
    assert reused[0] == 0 and reused[1] >= 2.5 * alone
    assert facts_found(output) >= 3, output


@pytest.mark.parametrize("name", ["agent.py", "frontend.py"])
def test_without_a_server_it_says_how_to_start_one(name: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = run([sys.executable, ROOT / "examples" / name, "--small", "--base-url", url])
    assert done.returncode == 1
    assert f"no SGLang server answers at {url}" in done.stderr and "`make serve`" in done.stderr
    assert "Traceback" not in done.stderr
