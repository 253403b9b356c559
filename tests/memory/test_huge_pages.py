"""Huge pages hold what was there, and lie inside of the array.

Red when: an array's bytes change; memory beside it is advised; or an array that is large enough stays in small pages where the
system gives huge ones.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from sglang_clusterkv.memory.huge_pages import use_huge_pages

HUGE = 2 << 20


def huge_bytes(address: int) -> int:
    """Of the mapping that an address lies in."""
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_what_an_array_holds_stays() -> None:
    numbers = torch.arange(4 * HUGE // 4, dtype=torch.int32)
    made = use_huge_pages([numbers, torch.zeros(100)])
    assert torch.equal(numbers, torch.arange(4 * HUGE // 4, dtype=torch.int32))
    assert made in (0, 3 * HUGE, 4 * HUGE), "four where the array begins with a page"
    assert huge_bytes(numbers.data_ptr() + HUGE) >= made


def test_a_small_array_is_left_alone() -> None:
    assert use_huge_pages([torch.zeros(HUGE // 4 - 1)]) == 0
