"""Work of the CPU kernels over threads: the same bits for every number of them, and nobody waits for a thread that sleeps.

Red when: a thread's scratch is another's; an item is taken twice, or left; a call returns before its items are done; a helper
that comes late touches a later call; a process that was forked waits for its parent's helpers; or a kernel that was
compiled with another constant is taken from the disk.
"""

from __future__ import annotations

import ast
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import cpu_math, layer_cpu, threads_cpu, token_tiles_cpu
from sglang_clusterkv.kernels.attend.cpu import dense_decode
from sglang_clusterkv.kernels.cpu_math import njit
from sglang_clusterkv.kernels.decode import cpu
from sglang_clusterkv.kernels.decode.chain_cpu import chain_kernel
from sglang_clusterkv.kernels.encode import cpu as encode_cpu
from sglang_clusterkv.kernels.extend.cpu import extend
from sglang_clusterkv.kernels.threads_cpu import done, leave, run, set_threads, take
from tests.support.scenes import Scene

SCALE = 0.2


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    yield
    set_threads(None)


@njit(nogil=True)
def squares(number, counter, items, out, by):  # type: ignore[no-untyped-def]
    item = take(counter)
    while item < items:
        out[item] += item * item
        by[item] = number
        done(counter)
        item = take(counter)
    leave(number, counter, items)


@njit
def take_one(counter):  # type: ignore[no-untyped-def]
    take(counter)


@njit
def finish_one(counter):  # type: ignore[no-untyped-def]
    done(counter)


def test_every_item_is_done_once() -> None:
    set_threads(4)
    for items in (1, 3, 500):
        out, by = np.zeros(items, np.int64), np.full(items, -1)
        run(squares, items, out, by)
        assert out.tolist() == [i * i for i in range(items)] and by.min() >= 0 and by.max() < 4


def test_nobody_waits_for_a_helper_that_sleeps_and_it_finds_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list = []
    monkeypatch.setattr(threads_cpu._helpers, "call", lambda kernel, args: late.append((kernel, args)))
    set_threads(3)
    out, by = np.zeros(50, np.int64), np.full(50, -1)
    run(squares, 50, out, by)
    assert (by == 0).all() and len(late) == 2
    before = out.copy()
    for kernel, args in late:
        kernel(*args)
    np.testing.assert_array_equal(out, before)


def test_a_call_returns_when_the_items_that_others_took_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper takes one item and is slow with it."""
    taken, release = threading.Event(), threading.Event()

    def helper(kernel: object, args: tuple) -> None:
        counter = args[1]

        def work() -> None:
            take_one(counter)
            taken.set()
            release.wait()
            finish_one(counter)

        threading.Thread(target=work, daemon=True).start()
        taken.wait()

    monkeypatch.setattr(threads_cpu._helpers, "call", helper)
    set_threads(2)
    out, by = np.zeros(5, np.int64), np.full(5, -1)
    caller = threading.Thread(target=run, args=(squares, 5, out, by), daemon=True)
    caller.start()
    taken.wait()
    time.sleep(0.2)
    assert caller.is_alive() and out.tolist() == [0, 1, 4, 9, 16]
    release.set()
    caller.join(30)
    assert not caller.is_alive()


def test_a_forked_process_has_helpers_of_its_own() -> None:
    set_threads(2)
    run(squares, 4, np.zeros(4, np.int64), np.zeros(4, np.int64))
    child = os.fork()
    if child == 0:
        out = np.zeros(40, np.int64)
        run(squares, 40, out, np.zeros(40, np.int64))
        started = threads_cpu._helpers._started
        os._exit(0 if out.tolist() == [i * i for i in range(40)] and started == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_same_bits_whatever_the_threads() -> None:
    config = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
    scene = Scene(config)
    lengths = [700, 333, 1300]
    for row, length in enumerate(lengths, 1):
        scene.prefill(row, length)
    step = scene.decode([1, 2, 3], [length + 1 for length in lengths]).sparse
    q, pool = scene.queries(3, 4), (scene.keys[0], scene.values[0])
    slots = torch.stack([torch.nn.functional.pad(scene.slots(row, 333), (0, 0)) for row in (1, 2, 3)])
    found = []
    for count in (1, 2, 5, 2):
        set_threads(count)
        found.append(
            (
                cpu.sparse_decode(
                    q, *pool, scene.index, 0, step._replace(), SCALE
                ),  # another step: buffers are made anew
                dense_decode(q, *pool, slots, torch.tensor([333, 200, 1]), SCALE),
                extend(scene.queries(3, 4)[:0].new_ones(3, 4, 32), *pool, scene.slots(3, 1300), SCALE),
            )
        )
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_what_is_kept_on_disk_goes_with_every_constant_that_kernels_hold() -> None:
    folder, held = Path(threads_cpu.__file__).parents[1], set[str]()
    for path in folder.glob("kernels/**/*cpu*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            package, _, module = (getattr(node, "module", None) or "").rpartition(".")
            if package == "sglang_clusterkv.memory" and any(alias.name.isupper() for alias in node.names):
                held.add(f"{module}.py")
    assert len(held) > 3 and held <= set(cpu_math.CONSTANTS)


def test_kernels_are_kept_as_long_as_what_they_call_and_hold() -> None:
    kernels: list[Any] = [
        token_tiles_cpu._products,
        encode_cpu._encode,
        layer_cpu.norm_rows,
        chain_kernel(32, 2, 0, 2, 3),
    ]
    for kernel in kernels:
        assert kernel.py_func.__qualname__.endswith("_" + cpu_math.sources())
