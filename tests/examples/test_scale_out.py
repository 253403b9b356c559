"""Two servers behind SGLang's router, as examples/scale_out.py starts them.

Red when: cache-aware routing finds no more in the caches and clusters than requests dealt in turn, a request is lost when a
server dies, an answer then differs, or something is left running.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.servers import CPU_FLAGS, PORTS, free_port
from examples.scale_out import BEGIN, END, shown
from tests.support.servers import ASLEEP

ROOT = Path(__file__).parents[2]
ROUTER = os.environ.get("CLUSTERKV_ROUTER")  # a command, where it is not installed beside this


def rows_of(printed: str) -> dict[str, list[int]]:
    """Of each row: tokens of the prompts, cached, share, clustered, reused."""
    rows = {}
    for name, figures in re.findall(r"^(\S.*?) {2,}([\d,]+ .*)$", printed, re.MULTILINE):
        rows[name] = [int(figure.replace(",", "")) for figure in re.findall(r"[\d,]+", figures)]
    return rows


def test_what_is_written_names_no_machine() -> None:
    words = [
        "--model",
        "/home/me/m",
        "--port=1",
        "--tokens",
        "9",
        "--router",
        "/tmp/x launch",
        "--write=p",
        "--device",
        "cpu",
    ]
    assert shown(words) == ["--model", "MODEL", "--tokens", "9", "--device", "cpu"]


@pytest.mark.server
@pytest.mark.long
@pytest.mark.skipif(
    not (ROUTER or shutil.which("smg")), reason="no router: pip install smg, or name one by CLUSTERKV_ROUTER"
)
def test_sessions_stay_with_their_clusters_and_outlive_a_server(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    assert port + 10 in range(PORTS.start, 65_000)
    command = [sys.executable, "examples/scale_out.py", "--model", str(tiny), "--port", str(port), "--tokens", "800"]
    command += ["--answer-tokens", "4", *(["--router", ROUTER] if ROUTER else []), *CPU_FLAGS, ASLEEP]
    command += ["--max-total-tokens", "16384", "--max-running-requests", "4", "--one-server"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    command += ["--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answers as before: 5 of 5" in done.stdout
    rows = rows_of(done.stdout)
    dealt, aware = rows["2 servers, round_robin"], rows["2 servers, cache_aware"]
    assert aware[0] == pytest.approx(dealt[0], rel=0.01)  # the same questions
    assert aware[1] > 1.3 * dealt[1] and aware[3] < 0.8 * dealt[3] and aware[4] > dealt[4]
    assert rows["after one died, last turns"][3] > 0
    # Replicas are dealt to as two servers are; ranks are one server; replicas that the router knows are two behind it.
    assert rows["1 server, --dp-size 2"][1] == pytest.approx(dealt[1], rel=0.05)
    for name in ("1 server, --tp-size 2", "--dp-size 2, --dp-aware"):
        assert rows[name][1] == pytest.approx(aware[1], rel=0.05), name
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert rows_of(written) == rows and str(tiny) not in written
