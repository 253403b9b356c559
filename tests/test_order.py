"""How processes share the test files (tests/conftest.py).

Red when: a file that uses a shared server is not named with it, so that another process starts one more; a name there is of no
file; the tests of one server do not follow each other, or the longest do not come first.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import LONGEST_FIRST, SHARED_SERVERS, pytest_collection_modifyitems, share_of

ROOT = Path(__file__).parents[1]
LONG = {"tests/serving/test_churn.py", "tests/serving/test_tp.py"}  # their tests of servers, which one process runs


def test_files_are_named_with_the_server_that_they_use() -> None:
    found = {
        str(path.relative_to(ROOT)): set(re.findall(r"\b(tiny|demo)_server: Server", path.read_text()))
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    found["tests/serving/test_peers.py"] = {"demo"}  # unless it is asked for another backend
    used = {file: uses for file, uses in found.items() if uses and file not in LONG}
    assert used == {file: {name} for file, name in SHARED_SERVERS.items()}


def test_the_longest_come_first_and_those_of_one_server_together() -> None:
    files = sorted({*SHARED_SERVERS, *LONGEST_FIRST[2:], "tests/test_config.py", "tests/memory/test_codec.py"})
    assert all((ROOT / file).exists() for file in files)
    assert set(SHARED_SERVERS.values()) <= set(LONGEST_FIRST)
    items: list[Any] = [SimpleNamespace(nodeid=f"{file}::test_{i}") for file in files for i in range(2)]
    by_one: Any = list(items)
    pytest_collection_modifyitems(SimpleNamespace(), by_one)
    assert by_one == items
    pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)
    shares = list(dict.fromkeys(share_of(item.nodeid) for item in items))
    assert shares == [*LONGEST_FIRST, "tests/memory/test_codec.py", "tests/test_config.py"]
    assert [share_of(item.nodeid) for item in items] == sorted(
        (share_of(item.nodeid) for item in items), key=shares.index
    )
