"""The model of a step with a tier of host memory counts what one can count by hand.

Red when: a row that the device does not have is also read from its memory, or comes at another size than the host's, a tier
costs something where everything fits, a cache of rows takes no room, or a word is not what its figures say.
"""

from __future__ import annotations

import pytest

from benchmarks.tier_model import (
    CELLS,
    Hits,
    Model,
    Tier,
    cache_word,
    capacity_tokens,
    hit_rate,
    hits_in,
    tier_launches,
    tier_speed,
    tier_table,
    tokens_per_s,
    waiting_speed,
)
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import Launch, StepShape, sparse_launches

CONFIG = ClusterKVConfig()
LLAMA = StepShape(layers=32, heads=32, kv_heads=8, head_dim=128, batch=8, context=32_768)
MODEL = Model()
NEAR = Hits("near", {2.0: 0.9, 4.0: 0.8, 8.0: 0.6}, {4.0: 0.95, 8.0: 0.9})
INT8 = Tier(4.0, "int8")


def attend(hit: float, host_dtype: str) -> Launch:
    (found,) = (launch for launch in tier_launches(LLAMA, CONFIG, host_dtype, hit) if launch.name == "attend")
    return found


def test_missed_rows_move_from_one_memory_to_the_other() -> None:
    everything, some = attend(1.0, "int8"), attend(0.75, "int8")
    missed = 64 * 512 // 4  # (request, kv head), a quarter of the budget
    assert everything.bus_bytes == 0
    assert some.bus_bytes == missed * (2 * 128 + 8)
    assert everything.bytes - some.bytes == missed * 512
    assert attend(0.75, "auto").bus_bytes == missed * 512
    assert tier_launches(LLAMA, CONFIG, "int8", 1.0) == sparse_launches(LLAMA, CONFIG, joined=False)


def test_the_bus_has_its_own_time() -> None:
    launch = Launch("a", programs=1, bytes=4_300_000, bus_bytes=50_000)
    assert launch.microseconds(4.3, 50.0) == pytest.approx(1.0 + 1.0 + 2.5)
    assert launch.microseconds(4.3, 10.0) == pytest.approx(1.0 + 5.0 + 2.5)


def test_the_speed_of_a_step() -> None:
    # 15 GB of weights, 32 layers; all 32 * 64 * 512 rows of 264 bytes over a bus so slow that it is all that counts.
    seconds = 32 * 64 * 512 * 264 / 1e6
    assert tokens_per_s(MODEL, LLAMA, CONFIG, "int8", 0.0, 0.001) == pytest.approx(8 / seconds, rel=0.05)
    weights = MODEL._replace(tbs=0.001)
    assert tokens_per_s(weights, LLAMA._replace(context=400), CONFIG, "int8", 1.0, 50.0) == pytest.approx(
        8 / 15.4, rel=0.05
    )


def test_hit_rates_between_measured_ones() -> None:
    assert [hit_rate(NEAR.pages, ratio) for ratio in (0.5, 1, 2, 4, 8, 100)] == [1.0, 1.0, 0.9, 0.8, 0.6, 0.6]
    assert hit_rate(NEAR.pages, 2**1.5) == pytest.approx(0.85)
    assert hit_rate(NEAR.cache, 2) == pytest.approx(0.975)


def test_the_capacity_is_memory_over_bytes_per_token() -> None:
    # 131,072 bytes of KV; the index has 66.5 per kv head and layer, and 12 per page.
    index = (132 - 16.1) * 1e9 / capacity_tokens(MODEL, CONFIG, 1.0) - 131_072
    assert index == pytest.approx(66.5 * 256 + 12 / 16, abs=1)
    assert capacity_tokens(MODEL, CONFIG, 4.0) == pytest.approx((132 - 16.1) * 1e9 / (131_072 / 4 + index))


def test_a_tier_costs_nothing_where_everything_fits() -> None:
    assert tier_speed(MODEL, LLAMA, CONFIG, INT8, NEAR, 50.0) == waiting_speed(MODEL, LLAMA, CONFIG)
    far = LLAMA._replace(batch=40)
    speeds = [tier_speed(MODEL, far, CONFIG, INT8, NEAR, bus) for bus in (50.0, 10.0)]
    assert speeds[0] and speeds[1] and speeds[0] > speeds[1]


def test_requests_that_wait_are_no_faster_than_those_that_fit() -> None:
    fitting = int(capacity_tokens(MODEL, CONFIG, 1.0) // 32_768)
    speeds = [
        waiting_speed(MODEL, LLAMA._replace(batch=batch), CONFIG) for batch in (fitting - 1, fitting, 4 * fitting)
    ]
    assert speeds[0] < speeds[1] == speeds[2]
    assert waiting_speed(MODEL._replace(memory_gb=18.0), LLAMA, CONFIG) == 0.0


def test_a_batch_beyond_both_tiers_does_not_fit() -> None:
    assert tier_speed(MODEL, LLAMA._replace(batch=72), CONFIG, INT8, NEAR, 50.0) is None
    assert tier_speed(MODEL, LLAMA._replace(batch=71), CONFIG, INT8, NEAR, 50.0) is not None


def test_a_cache_of_rows_takes_the_place_of_pages() -> None:
    # As good as the pages themselves, a cache is only their loss: two budgets for each request.
    same = NEAR._replace(cache=NEAR.pages)
    far = LLAMA._replace(batch=40)
    plain, cached = (tier_speed(MODEL, far, CONFIG, tier, same, 10.0) for tier in (INT8, INT8._replace(is_cached=True)))
    assert plain and cached and 0.9 * plain < cached < plain
    better = tier_speed(MODEL, far, CONFIG, INT8._replace(is_cached=True), NEAR, 10.0)
    assert better and better > 1.2 * plain


@pytest.mark.parametrize(
    ("speeds", "word"),
    [
        ((100.0, None, None), "does not fit"),
        ((100.0, 100.0, 120.0), "no"),
        ((100.0, 90.0, 110.0), "must"),
        ((100.0, 80.0, 90.0), "not enough"),
        ((100.0, 80.0, None), "does not fit"),
    ],
)
def test_the_word_is_what_the_figures_say(speeds: tuple[float, float | None, float | None], word: str) -> None:
    assert cache_word(*speeds) == word


def test_the_table_has_every_kind_and_cell() -> None:
    shares = {"newest_2": 0.9, "newest_4": 0.8, "newest_8": 0.6, "newest_4_or_lru_2": 0.95, "newest_8_or_lru_2": 0.9}
    entry = {"kind": "near", "budget": 512, "shares": {"steps": 3} | {name: {"all": at} for name, at in shares.items()}}
    assert hits_in({"a": entry, "b": entry | {"budget": 256}}, 512) == [NEAR]
    rows = tier_table([NEAR, NEAR._replace(kind="other")], MODEL, CONFIG)
    assert len(rows) == 2 * len(CELLS) and {len(row) for row in rows} == {10}
    batch, context = CELLS[0]
    shape = MODEL.shape(batch, context)
    speed = tier_speed(MODEL, shape, CONFIG, INT8, NEAR, 50.0)
    assert rows[0][:4] == ["near", f"{batch}", f"{context:,}", f"{waiting_speed(MODEL, shape, CONFIG):,.0f}"]
    assert rows[0][4] == f"{speed:,.0f}"
