"""The picture of the board shows what the board's queries say of what was read from /metrics.

Red when: a query of docs/grafana.json cannot be evaluated, a rate, a quantile, a sum by labels or a ratio is another number, a
query of an unknown form is drawn as something, or a panel of the board is not in the picture.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import board
from benchmarks.board_queries import Query, Scrape, lines_of, read_scrape

METRICS = """
# TYPE sglang:clusterkv_dense_steps counter
sglang:clusterkv_dense_steps_total{{model_name="m",tp_rank="0",reason="short"}} {short}
sglang:clusterkv_dense_steps_total{{model_name="m",tp_rank="0",reason="dirty"}} {dirty}
sglang:clusterkv_dense_steps_total{{model_name="m",tp_rank="1",reason="short"}} 1000
# TYPE sglang:clusterkv_bytes gauge
sglang:clusterkv_bytes{{model_name="m",tp_rank="0",pp_rank="0"}} 5
sglang:clusterkv_bytes{{model_name="m",tp_rank="1",pp_rank="0"}} 7
# TYPE sglang:ttft_seconds histogram
sglang:ttft_seconds_bucket{{le="0.5"}} {half}
sglang:ttft_seconds_bucket{{le="1.0"}} {one}
sglang:ttft_seconds_bucket{{le="+Inf"}} {one}
sglang:ttft_seconds_count {one}
sglang:ttft_seconds_sum 1
"""


@pytest.fixture
def scrapes() -> list[Scrape]:
    counts = [(0, 0, 0, 0), (4, 0, 1, 4), (8, 6, 2, 8), (8, 6, 2, 8)]
    texts = [METRICS.format(short=s, dirty=d, half=h, one=o) for s, d, h, o in counts]
    return [read_scrape(text, 2.0 * number) for number, text in enumerate(texts)]


def at_end(text: str, scrapes: list[Scrape], interval_s: float = 4) -> dict[str, float]:
    query = Query(text, scrapes, interval_s)
    return {" ".join(value for _, value in labels): found for labels, found in query.at(len(scrapes) - 1).items()}


DENSE = 'sglang:clusterkv_dense_steps_total{model_name=~"$model", instance=~"$instance", tp_rank=~"$rank"}'


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (f"sum (rate({DENSE}[$__rate_interval]))", {"": 2.5}),
        (f"sum by (reason) (rate({DENSE}[$__rate_interval]))", {"short": 1.0, "dirty": 1.5}),
        (f"sum by (reason) (increase({DENSE}[$__rate_interval])) > 4", {"dirty": 6.0}),
        ('sum by (tp_rank, pp_rank) (sglang:clusterkv_bytes{model_name=~"$model"})', {"0 0": 5, "0 1": 7}),
        ('avg (sglang:clusterkv_bytes{model_name=~"$model"})', {"": 6}),
        (
            'max (sglang:clusterkv_bytes{model_name=~"$model"}) / min (sglang:clusterkv_bytes{model_name=~"$model"})',
            {"": 1.4},
        ),
        ('sum (sglang:nothing{model_name=~"$model"})', {}),
        (
            "histogram_quantile(0.5, sum by (le) (rate(sglang:ttft_seconds_bucket{}[$__rate_interval])))",
            {"": pytest.approx(0.5 + 0.5 * 1 / 3)},
        ),
    ],
)
def test_a_query_is_what_prometheus_would_say(query: str, found: dict[str, Any], scrapes: list[Scrape]) -> None:
    assert at_end(query, scrapes) == found


def test_a_rate_is_over_no_more_than_its_interval(scrapes: list[Scrape]) -> None:
    query = Query(f"sum (rate({DENSE}[$__rate_interval]))", scrapes, 2)
    ((_, points),) = query.over_time().items()
    assert points == [(2.0, 2.0), (4.0, 5.0), (6.0, 0.0)]


@pytest.mark.parametrize("query", ["topk(3, x{})", "sum (x{}) * 2", "sum (rate(x{}[5m]))", "sum (x{", "stddev (x{})"])
def test_a_query_of_another_form_is_an_error(query: str, scrapes: list[Scrape]) -> None:
    with pytest.raises(ValueError, match="known here"):
        Query(query, scrapes, 4).over_time()


def test_every_panel_of_the_board_is_in_the_picture(scrapes: list[Scrape]) -> None:
    lines = board.lines_of_board(scrapes)
    figure = board.picture(lines, "a title")
    titles = {axes.get_title(loc="left") for axes in figure.axes} - {""}
    assert titles == set(lines) and len(titles) > 15
    assert {note.get_text() for axes in figure.axes for note in axes.texts} >= {
        "Quality",
        "Host tier",
        "Server",
        "no data",
    }
    drawn = next(axes for axes in figure.axes if axes.get_title(loc="left") == "Decode steps")
    assert {line.get_label() for line in drawn.lines} == {"dense: dirty", "dense: short"}
    assert json.loads(json.dumps(board.rounded(lines)))["Bytes of the index"]["rank 1, stage 0"][-1] == [6.0, 7.0]


def test_the_table_has_last_and_largest_in_the_panels_unit(scrapes: list[Scrape]) -> None:
    rows = board.table(board.lines_of_board(scrapes)).splitlines()
    assert "| Decode steps | dense: dirty | 1 steps/s | 1.5 steps/s |" in rows
    assert "| Bytes of the index | rank 1, stage 0 | 7 B | 7 B |" in rows
    assert "| Faults | no data | | |" in rows


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "percentunit", "12.3 %"),
        (1590, "suffix: tokens/s", "1.59k tokens/s"),
        (2_500_000, "Bps", "2.5 MB/s"),
        (0.25, "s", "0.25 s"),
        (9470, "short", "9.47k"),
        (0, "short", "0"),
    ],
)
def test_values_are_written_in_their_unit(value: float, unit: str, text: str) -> None:
    assert board.written(value, unit) == text


def test_a_line_is_named_by_its_legend(scrapes: list[Scrape]) -> None:
    panel = {"targets": [{"expr": f"sum by (reason) ({DENSE})", "legendFormat": "dense: {{reason}}"}]}
    assert lines_of(panel, scrapes, 4)["dense: short"][-1] == (6.0, 8.0)
