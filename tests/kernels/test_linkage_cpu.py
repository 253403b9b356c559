"""A kernel gives the same bits in a process that compiles it and in one that finds it on disk, beside whatever others.

Red when: a kernel calls another kernel's copy of a function that has the same name, or one that was optimised less often.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from sglang_clusterkv.kernels.attend.cpu import dense_decode

KV_HEADS, TOKENS = 2, 700
SMALL, LARGE = "16x2", "64x3"  # channels x group


def digest(shape: str) -> str:
    """What dense attention with this head_dim and group size gives, as a digest."""
    channels, group = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(1)
    q, keys, values = (
        torch.randn(n, heads, channels, generator=generator)
        for n, heads in ((1, KV_HEADS * group), (TOKENS, KV_HEADS), (TOKENS, KV_HEADS))
    )
    out = dense_decode(q, keys, values, torch.arange(TOKENS).unsqueeze(0), torch.tensor([TOKENS]), channels**-0.5)
    return hashlib.sha256(out.numpy().tobytes()).hexdigest()


def test_bits_do_not_follow_from_what_was_compiled_where(tmp_path: Path) -> None:
    # numba's names have the order of a set of strings in them.
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}

    def in_a_process(*shapes: str) -> list[str]:
        command = [sys.executable, "-m", "tests.kernels.test_linkage_cpu", *shapes]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()

    compiled = in_a_process(SMALL) + in_a_process(LARGE)
    assert in_a_process(SMALL, LARGE) == compiled


if __name__ == "__main__":
    print(*map(digest, sys.argv[1:]))
