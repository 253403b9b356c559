"""A refusal that a scheduler process finds ends the server with its sentence, not with SGLang's traceback.

Red when: a traceback is printed, the sentence is not, the server's first process is not told, the scheduler goes on; or
when a process of a caller's own is ended instead of getting the exception.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.serving.late_refusal import sentence_alone

# The first process of a server, which SGLang's schedulers tell by SIGQUIT that they failed.
SERVER = """
import multiprocessing, os, signal, sys
from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.serving.late_refusal import sentence_alone

def schedule():
    with sentence_alone():
        raise ConfigError("no room: use less")
    print("it went on")

if __name__ == "__main__":
    told = []
    signal.signal(signal.SIGQUIT, lambda *_: told.append(1))
    child = multiprocessing.get_context("fork").Process(target=schedule)
    child.start()
    child.join()
    print(told, child.exitcode)
"""


def test_a_scheduler_ends_its_server_with_the_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1] 1\n", done
    assert done.stderr == "sglang-clusterkv: no room: use less\n"


def test_a_caller_without_a_server_above_gets_the_exception() -> None:
    with pytest.raises(ConfigError, match="use less"), sentence_alone():
        raise ConfigError("no room: use less")
