"""Instructions are counted by the source's loops and branches, and the step's time follows from them.

Red when: an instruction is taken for one of another loop or call, what was moved out of a loop counts as often as it, a loop
whose runs nobody named passes, or the table of the pieces is not of these kernels (long).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import executed as executed_module
from benchmarks import instructions
from benchmarks.compiled import KEPT, read_kept
from benchmarks.executed import executed, terms, usually_executed
from benchmarks.instructions import PIECES
from benchmarks.machine_code import MODEL_TARGET
from benchmarks.step_time import CELLS, shape_of, table
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import instruction_counts
from sglang_clusterkv.kernels.step_model import JOINED, sparse_launches
from sglang_clusterkv.kernels.step_time import (
    GAP_US,
    OTHER_MS,
    MixedWork,
    Work,
    dense_us,
    sparse_times,
    speedup,
    work_of,
)

SOURCE = """
def inner(n):
    for i in range(n):
        if i > 2:
            first()
        else:
            second()


def kernel(n):
    while n > 0:
        inner(n)
        third()
    inner(7)
"""
INNER = "for range(n)"


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As nvdisasm prints: each instruction below its lines, the innermost first."""
    source = tmp_path / "kernel.py"
    source.write_text(SOURCE)
    monkeypatch.setattr(executed_module, "ROOT", tmp_path)

    def at(text: str, *lines: int) -> str:
        frames = [f'\t//## File "{source}", line {line}' for line in lines]
        return "\n".join([*frames, f"        /*0000*/                   {text} ;"])

    return "\n".join(
        [
            at("LDC R1", 10),
            at("MOV R2", 5, 12),  # moved out of both loops
            ".L_x_1:",
            at("IADD R1", 13),
            at("MOV R3", 5, 12),  # moved out of the inner one
            ".L_x_2:",
            at("FADD R4", 5, 12),
            at("FMUL R4", 7, 12),
            at("@P0 BRA `(.L_x_2)", 3, 12),
            at("@P1 BRA `(.L_x_1)", 11),
            ".L_x_3:",
            at("FADD R5", 5, 14),
            at("@P0 BRA `(.L_x_3)", 3, 14),
            at("EXIT", 14),
            ".L_x_4:",
            at("BRA `(.L_x_4)", 14),  # behind the end
        ]
    )


def test_an_instruction_lies_in_the_loops_and_branches_of_its_lines(listing: str) -> None:
    within, alone = f"{INNER} @ inner(n)", f"{INNER} @ inner(7)"
    assert terms(listing) == {
        (): 3,
        ("if i > 2 @ inner(n)",): 1,
        ("while n > 0",): 2,
        ("while n > 0", "if i > 2 @ inner(n)"): 1,
        ("while n > 0", within, "if i > 2 @ inner(n)"): 1,
        ("while n > 0", within, "else i > 2 @ inner(n)"): 1,
        ("while n > 0", within): 1,
        (alone, "if i > 2 @ inner(7)"): 1,
        (alone,): 1,
    }


def test_what_is_executed_follows_from_how_often_loops_run(listing: str) -> None:
    counted = terms(listing)
    runs = {"while n > 0": 10, INNER: 4, f"{INNER} @ inner(7)": 7, "else i > 2": 0.5, "if i > 2": 0.5}
    assert executed(counted, runs) == 3 + 0.5 + 10 * (2 + 0.5 + 4 * (0.5 + 0.5 + 1)) + 7 * (0.5 + 1)
    assert executed(counted, {}, 0.0) == 4
    with pytest.raises(KeyError, match="while n > 0"):
        executed(counted, {INNER: 1})


def test_a_kernel_as_a_whole_has_loops_that_run_as_usual(listing: str) -> None:
    usual = {"while n > 0": 4, INNER: 4, f"{INNER} @ inner(7)": 4}
    assert usually_executed(listing) == executed(terms(listing), usual)


def test_the_kept_counts_are_of_the_pieces() -> None:
    assert list(instruction_counts.PIECES) == list(PIECES)
    assert all(count > 0 for count in instruction_counts.PIECES.values())
    assert Path(instruction_counts.__file__).read_text() == instructions.kept_text(instruction_counts.PIECES)


@pytest.mark.long
def test_the_kept_counts_are_of_these_kernels() -> None:
    """Compiles eight cases, in a process where nothing is interpreted."""
    code = """
import json
from benchmarks.compiled import collect
from benchmarks.instructions import counted_pieces
from benchmarks.machine_code import MODEL_TARGET, listing_of
cases = collect(())
print(json.dumps(counted_pieces(lambda name: listing_of(cases[name], MODEL_TARGET))))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    assert json.loads(done.stdout) == instruction_counts.PIECES


def test_a_launch_takes_its_bytes_or_its_instructions() -> None:
    config = ClusterKVConfig()
    for batch, thousands in CELLS:
        shape = shape_of(batch, thousands)
        launches = {launch.name: launch for launch in sparse_launches(shape, config)}
        times = sparse_times(shape, config)
        assert list(times) == list(launches)
        for name, time in times.items():
            assert GAP_US + launches[name].bytes / 4.3e6 <= time.floor <= time.likely, (name, time)
    assert len(table(config, launches=True).splitlines()) == 2 + len(CELLS)


def test_programs_of_several_kinds_start_where_one_ends() -> None:
    one = MixedWork([1e6] * 132, 8, 1)
    assert one.likely_us(132) == pytest.approx(Work(132e6, 8, 1).likely_us(132))
    unlike = MixedWork([3e6] * 66 + [1e6] * 132, 8, 1)
    assert unlike.likely_us(198) == pytest.approx(3 * one.likely_us(132)), "two short ones beside each long one"
    assert MixedWork([3e6] * 66 + [1e6] * 133, 8, 1).likely_us(199) == pytest.approx(3 * one.likely_us(132))
    assert MixedWork([3e6], 8, 1).floor_us() == pytest.approx(3e6 / 8 / 1800), (
        "a warp is no faster than one instruction a cycle"
    )


def test_programs_that_fill_the_machine_once_more_take_twice_as_long() -> None:
    one = Work(132 * 1e6, 8, 1)
    assert one.floor_us() == pytest.approx(1e6 / 4 / 1800)
    assert one.likely_us(132) == pytest.approx(1e6 / (8 * 0.16) / 1800)
    assert Work(133 * 1e6, 8, 1).likely_us(133) == pytest.approx(2 * one.likely_us(132))
    assert Work(264 * 1e6, 8, 2).likely_us(264) == pytest.approx(2e6 / 2.2 / 1800), "two share an SM, up to its limit"
    shape = shape_of(8, 32)
    assert speedup(shape, dense_us(shape)) == 1.0
    assert speedup(shape, 0.0) == pytest.approx(1 + shape.layers * dense_us(shape) / 1e3 / OTHER_MS)


# Launches of the model, at 8 x 32k or where there are more than 4,096 clusters: the compile case of each.
CASES = {
    "score": "score int4 D=128 G=4",
    "select: masses": "select masses C=4096 G=4",
    "select: clusters": "select C=4096 K=2048 short",
    "refine: values": "refine values 2 bits D=128 G=4 x256",
    "refine: choice": "refine recall K=2048 O=512 R=512 C=131,072",
    JOINED: "attend and estimate int4 D=128 G=4 C=4,096",
    "merge": "merge D=128",
}
LARGE = {"select: masses": "select masses C=131072 G=4", "select: clusters": "select C=131072 K=2048 short"}
FEW = {"refine: values": "refine values 2 bits D=128 G=4 x64"}


@pytest.mark.parametrize(
    ("batch", "thousands", "cases"), [(8, 32, CASES), (6, 128, CASES | LARGE), (1, 32, CASES | FEW)]
)
def test_an_sm_holds_as_many_programs_as_the_model_says(batch: int, thousands: int, cases: dict[str, str]) -> None:
    """By the machine code that is kept."""
    kept = {name: one.result for (name, target), one in read_kept(KEPT).items() if target == MODEL_TARGET}
    work = work_of(shape_of(batch, thousands), ClusterKVConfig())
    assert list(work) == list(cases)
    for name, of in work.items():
        assert of.resident <= kept[cases[name]].programs_per_sm, name


def test_of_few_pairs_two_programs_choose_side_by_side() -> None:
    """What codes need is off the longest path then, and no program more is there for many pairs."""
    config, without = ClusterKVConfig(), ClusterKVConfig(estimate_codes=False)
    few, many = (work_of(shape, config)["refine: choice"] for shape in (shape_of(8, 32), shape_of(28, 32)))
    alone = work_of(shape_of(8, 32), without)["refine: choice"]
    assert few.likely_us(128) == pytest.approx(alone.likely_us(64))
    assert many.likely_us(224) > work_of(shape_of(28, 32), without)["refine: choice"].likely_us(224)
