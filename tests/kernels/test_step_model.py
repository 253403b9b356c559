"""The model of a decode step counts what one can count by hand.

Red when: a launch reads or writes something that the model leaves out or counts twice, a grid is another one than the
kernels', or the table's sums are not those of its lines. That the grids are those of real launches, and the number of
launches with them, is in triton/test_chain.py.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import (
    JOINED,
    SMS,
    Launch,
    StepShape,
    dense_launches,
    flashinfer_launches,
    lists_of,
    sparse_launches,
    table,
)
from tests.support.flashinfer_plan import plan

CONFIG = ClusterKVConfig()
LLAMA = StepShape(layers=32, heads=32, kv_heads=8, head_dim=128, batch=8, context=32_768)


def test_the_lists_of_a_request() -> None:
    lists = lists_of(LLAMA, CONFIG)
    # 16 sinks and the last 64; 32,688 in clusters of 8, segments of 1,024 and pages of 16.
    assert lists == (80, 4086, 32, 2048, 512, 2043)


def test_a_short_request_recalls_what_it_has() -> None:
    lists = lists_of(LLAMA._replace(context=16 + 64 + 320), CONFIG)
    assert lists == (80, 40, 1, 320, 320, 20)


def by_name(shape: StepShape, config: ClusterKVConfig = CONFIG) -> dict[str, Launch]:
    launches = sparse_launches(shape, config)
    assert len(launches) <= 7 + (not config.refine)
    return {launch.name: launch for launch in launches}


def test_the_launches_of_a_llama_at_32k() -> None:
    launches = by_name(LLAMA)
    pairs, group = 64, 4
    logits = pairs * (4086 * (16 + 2 + 4) + 32 * 16)
    pages = 8 * 2 * 2043 * 8

    rows = 4086 * (64 + 4 * 2 + 2 + 2)  # 4-bit channels, four scales, spread, end
    vectors = 32 * 2 * 256  # mean key and variance
    tokens = 80 * (256 + 16)  # key, logits
    queries = group * (256 + 512)  # and rotated
    sums = (2 + 2 * 16) * 16
    assert launches["score"].programs == pairs * (1 + 2 + 8)
    assert launches["score"].bytes == logits + pages + 8 * 80 * 8 + pairs * (rows + vectors + tokens + queries + sums)

    assert launches["select: masses"].programs == pairs * 8
    masses = (8 * (2 + 2 * 16) + 1) * 16 + 2 * 4086 * 4
    assert launches["select: masses"].bytes == logits + pages // 2 + pairs * masses
    assert launches["select: clusters"].programs == pairs * 2
    assert launches["select: clusters"].bytes == pairs * (4086 * 8 + 2048 * 12 + 4086 * 8 + 1024 * 4)

    code = 32 + 2 + 2  # two bits a channel, scale, member
    values = 2048 * (code + 8 + 4 + 4 + 16) + 256 * 16 + 4 * 128 * 4  # a candidate's masses of four query heads
    assert launches["refine: values"].programs == pairs * 8
    assert by_name(LLAMA._replace(batch=1))["refine: values"].programs == 8 * 32
    assert launches["refine: values"].bytes == pages + pairs * values
    assert launches["refine: choice"].bytes == pairs * (
        2048 * (2 * 16 + 16) + 512 * (16 + 16) + 1024 * 12 + 515 * 4 + 256 * (16 + 4 + 8)
    )  # fmt: skip
    assert launches["refine: choice"].programs == pairs * 2
    assert by_name(LLAMA._replace(batch=9))["refine: choice"].programs == 72
    without = by_name(LLAMA, msgspec.structs.replace(CONFIG, estimate_codes=False))
    assert launches["refine: values"].bytes - without["refine: values"].bytes == pairs * 2048 * 16
    assert {name for name in without if without[name] != launches[name]} == {"refine: values", "refine: choice"}

    part = group * 129 * 4
    attend = 8 * 80 * 8 + pairs * (512 * (512 + 8) + 80 * (256 + 16) + group * 256)  # but for the parts
    estimate = logits + pages + pairs * (512 * 72 + 32 * 256 + 4086 * 4 + 515 * 4)
    assert launches[JOINED].programs == pairs * 6
    assert launches[JOINED].bytes == attend + estimate + pairs * 6 * part
    assert launches["merge"].programs == pairs * group
    assert launches["merge"].bytes == pairs * (6 * part + group * 256)

    single = {launch.name: launch for launch in sparse_launches(LLAMA, CONFIG, joined=False)}
    assert single["attend"].programs == pairs * 4
    assert single["attend"].bytes == attend + pairs * 4 * part
    assert single["estimate"].programs == pairs * (3 + 5)
    assert single["estimate"].bytes == estimate + pairs * 8 * part
    assert single["merge"].bytes == pairs * (12 * part + group * 256)


def test_the_launches_by_which_flashinfer_attends() -> None:
    pairs, group, tokens = 64, 4, 80 + 512
    lists, attend, merge = flashinfer_launches(LLAMA, CONFIG)
    queries, lses = pairs * group * 256, pairs * group * 4
    assert (lists.programs, lists.bytes) == (pairs * 2, pairs * 512 * 12 + 2 * queries)
    assert (attend.programs, attend.bytes) == (pairs * 4, pairs * tokens * (512 + 4) + queries + 4 * (queries + lses))
    assert (merge.programs, merge.bytes) == (2 * 132, 5 * (queries + lses))


@pytest.mark.parametrize(("batch", "budget"), [(1, 512), (1, 64), (8, 1024), (28, 512), (64, 512)])
def test_flashinfer_has_as_many_programs_as_its_plan(batch: int, budget: int) -> None:
    shape, config = LLAMA._replace(batch=batch), msgspec.structs.replace(CONFIG, budget_tokens=budget)
    lists = lists_of(shape, config)
    memory = np.zeros(1 << 20, np.uint8)
    lengths = np.full(shape.pairs, lists.base + lists.recalled)
    info, _, _ = plan(lengths, shape.group, shape.head_dim, True, SMS, memory)
    at = info.block_valid_mask_offset
    valid = memory[at : at + info.padded_batch_size].sum()
    assert flashinfer_launches(shape, config)[1].programs == valid


def test_a_dense_step_reads_every_token_once() -> None:
    dense, merge = dense_launches(LLAMA)
    assert dense.programs == 64 * 4
    assert dense.bytes == 64 * 32_768 * 512 + 8 * 32_768 * 8 + 64 * 4 * 4 * 129 * 4
    assert merge.bytes == 64 * (4 * 4 * 129 * 4 + 4 * 256)


def test_switches_change_the_launches() -> None:
    whole_clusters = by_name(LLAMA, msgspec.structs.replace(CONFIG, refine=False))
    select = ["select: masses", "select: clusters"]
    assert list(whole_clusters) == ["score", *select, "recall", "own clusters", JOINED, "merge"]
    assert whole_clusters["recall"].programs == 64 * 8
    assert whole_clusters["score"].programs == 64 * (2 + 8)
    assert whole_clusters["recall"].bytes == 64 * 512 * (8 + 2 + 8 + 8) + 8 * 2 * 2043 * 8
    exact = by_name(LLAMA, msgspec.structs.replace(CONFIG, estimate=False))
    assert "attend" in exact and JOINED not in exact
    own = by_name(LLAMA, msgspec.structs.replace(CONFIG, estimate_clusters=4086))
    assert own[JOINED].programs == 64 * 6 and own["select: clusters"].programs == 64


def test_time_is_bytes_over_bandwidth_and_a_launch() -> None:
    launch = Launch("a", programs=264, bytes=3_350_000)
    assert launch.waves == 2.0
    assert launch.microseconds(3.35) == pytest.approx(1.0 + 2.5)
    assert launch.microseconds(6.7) == pytest.approx(0.5 + 2.5)


def test_the_table_adds_up() -> None:
    lines = table(LLAMA, CONFIG, bandwidths_tbs=(4.8,)).splitlines()
    assert len(lines) == 1 + 7 + 2 + 2 + 2 + 1
    sparse = sum(launch.microseconds(4.8) for launch in sparse_launches(LLAMA, CONFIG))
    dense = sum(launch.microseconds(4.8) for launch in dense_launches(LLAMA))
    assert lines[10].split()[-1] == f"{sparse:.1f}" and lines[11].split()[-1] == f"{dense:.1f}"
    assert lines[12].split()[-1] == f"{32 * sparse / 1e3:.3f}"
    assert lines[-1].split()[-1] == f"{dense / sparse:.1f}"
