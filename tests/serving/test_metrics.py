"""What a dashboard shows is what the engine counted: our series on /metrics, their table in docs/ and the board beside it.

Red when: a counter counts something twice, or stands still at the end of a burst; a step waits for the device; a failure
of ours reaches the scheduler; a series is missing from docs/metrics.md; a query of docs/grafana.json names a series, a label
or a variable that does not exist; a rank has series that SGLang does not fill.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from benchmarks.servers import Server
from sglang_clusterkv.clusters import building, residency
from sglang_clusterkv.clusters import engine as engine_module
from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.memory.recalled_mass import mean_by_group
from sglang_clusterkv.memory.tier import Tier
from sglang_clusterkv.serving import active, metrics, runtime, scheduler_hooks
from sglang_clusterkv.serving.metrics import Exporter
from tests.support.scenes import Scene

DOCS = Path(__file__).parents[2] / "docs"
BOARD = json.loads((DOCS / "grafana.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
LABELS = {"model_name": "m", "engine_type": "unified", "tp_rank": 1, "pp_rank": 0, "moe_ep_rank": 0}
CONFIG = {"budget_tokens": 64, "candidate_tokens": 256, "segment_tokens": 256, "recluster_every": 64}
# The scrape adds these; Grafana knows the variables.
OF_PROMETHEUS, OF_GRAFANA = {"instance", "job"}, {"__rate_interval"}

Samples = dict[tuple[str, str], float]  # (name without prefix, our own label's value or "") -> value


# ---- the exporter, without a server


class Watched(ForwardStream):
    """The CPU's stream, counting who waits for it; `lags`: nothing that was queued has been done."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.waits = 0
        self.lags = False

    def event(self) -> Any:
        def synchronize() -> None:
            self.waits += 1

        return SimpleNamespace(synchronize=synchronize, query=lambda: not self.lags)


class Rank:
    """An engine whose requests decode, and an exporter with a registry and a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first_layer: int = 0) -> None:
        self.stream = Watched()
        self.scene = Scene(ClusterKVConfig(**CONFIG), stream=self.stream)
        self.engine = self.scene.engine
        self.pool: Any = SimpleNamespace(engine=self.engine, start_layer=first_layer)
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)
        self.registry = CollectorRegistry()
        self.exporter = Exporter(LABELS, self.registry, interval_s=5)
        self.length = 0

    def prefill(self) -> None:
        self.exporter.forward(self.pool)
        self.scene.prefill(1, 700)
        self.length = 700
        self.exporter.batch_done(self.pool)

    def decode(self) -> None:
        self.exporter.forward(self.pool)
        self.length += 1
        step = self.scene.decode([1], [self.length]).sparse
        for layer in range(2):
            keys, values = self.scene.keys[layer], self.scene.values[layer]
            sparse_decode(self.scene.queries(1, 4), keys, values, self.scene.index, layer, step, 0.2)
        self.exporter.batch_done(self.pool)

    def samples(self) -> Samples:
        found: Samples = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    assert {name: sample.labels[name] for name in LABELS} == {k: str(v) for k, v in LABELS.items()}
                    own = [value for name, value in sample.labels.items() if name not in LABELS]
                    found[sample.name.removeprefix("sglang:clusterkv_"), "".join(own)] = sample.value
        return found


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


def expected(info: dict[str, Any]) -> Samples:
    """The samples that go with a server_info, but for the mass and the time."""
    info = dict(info)
    found = {("clusters", ""): info.pop("clusters"), ("bytes", ""): info.pop("bytes")}
    found["running_reqs", ""] = info.pop("running")
    for name in ("clustered_layers", "config"):  # which, not how many
        info.pop(name, None)
    for name in ("recalled_mass", "build_ms"):
        del info[name]
    found |= {(f"{name}_total", label): 0 for name, labels in metrics.SHOWN.items() for label in labels}
    for name, value in info.items():
        of = value if isinstance(value, dict) else {"": value}
        found |= {(f"{name}_total", label): count for label, count in of.items()}
    return found


def without_times(samples: Samples) -> Samples:
    return {key: value for key, value in samples.items() if key[0] not in ("recalled_mass", "build_seconds_total")}


def test_every_count_of_server_info_has_a_series_and_is_counted_once(rank: Rank) -> None:
    rank.prefill()
    for _ in range(3):
        rank.decode()
    rank.engine.counters.faults["plan"] += 2
    rank.engine.counters.dense_layer_calls["sliding"] += 4
    for _ in range(2):
        rank.exporter.refresh(rank.pool)
        assert without_times(rank.samples()) == expected(rank.engine.server_info())
    assert rank.samples()["sparse_steps_total", ""] == 3 and rank.samples()["faults_total", "plan"] == 2
    rank.decode()
    rank.exporter.refresh(rank.pool)
    assert without_times(rank.samples()) == expected(rank.engine.server_info())


def test_batches_update_once_per_interval_and_no_launch_waits(rank: Rank) -> None:
    rank.prefill()
    assert rank.samples()["bytes", ""] == rank.scene.index.bytes, "the first batch makes the series"
    for _ in range(4):
        rank.now += 1
        rank.decode()
    assert rank.samples()["sparse_steps_total", ""] == 0 and rank.stream.waits >= 1
    rank.now += 1
    waits = rank.stream.waits
    rank.exporter.forward(rank.pool)
    assert rank.stream.waits == waits, "the copy is queued, not waited for"
    rank.exporter.batch_done(rank.pool)
    assert rank.samples()["sparse_steps_total", ""] == 4 and rank.stream.waits == waits + 1


def test_a_batch_does_not_wait_for_a_copy_behind_the_next_ones_clustering(rank: Rank) -> None:
    rank.prefill()
    rank.decode()
    rank.now += 5
    rank.stream.lags = True
    waits = rank.stream.waits
    rank.decode()
    rank.decode()
    assert rank.stream.waits - waits == 0 and rank.samples()["sparse_steps_total", ""] == 0
    rank.stream.lags = False
    rank.exporter.batch_done(rank.pool)
    assert rank.samples()["sparse_steps_total", ""] == 3


def test_the_end_of_a_burst_is_published_once(rank: Rank) -> None:
    rank.prefill()
    for _ in range(3):
        rank.decode()
    rank.exporter.idle(rank.pool)
    assert without_times(rank.samples()) == expected(rank.engine.server_info())
    waits = rank.stream.waits
    for _ in range(100):  # the scheduler spins while it is idle
        rank.exporter.idle(rank.pool)
    assert rank.stream.waits == waits
    rank.engine.row_freed(1)
    rank.exporter.forward(rank.pool)
    rank.exporter.idle(rank.pool)
    assert rank.samples()["running_reqs", ""] == 0


def test_the_mass_is_that_of_the_last_interval_by_the_models_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, first_layer=6)
    rank.prefill()
    assert not [key for key in rank.samples() if key[0] == "recalled_mass"], "nothing is claimed before a sparse step"
    rank.decode()
    rank.exporter.refresh(rank.pool)
    first = rank.scene.index.mass.clone()
    means = mean_by_group(first.numpy(), 6)
    assert list(means) == ["6", "7"] and all(0 < mean < 1 for mean in means.values())
    assert {key[1]: value for key, value in rank.samples().items() if key[0] == "recalled_mass"} == means
    rank.exporter.refresh(rank.pool)  # nothing was decoded: the last interval stays
    rank.decode()
    rank.exporter.refresh(rank.pool)
    later = mean_by_group((rank.scene.index.mass - first).numpy(), 6)
    assert later != means
    assert {key[1]: value for key, value in rank.samples().items() if key[0] == "recalled_mass"} == later


def test_what_an_operation_may_be_counted_as_is_there_from_the_start(rank: Rank) -> None:
    source = "".join(Path(module.__file__).read_text() for module in (engine_module, building, residency))
    named = re.findall(r'(?:faults\.note|_start_over|_wait)\("(\w+)"|doing = "(\w+)"', source)
    assert {"".join(names) for names in named} == set(metrics.OPERATIONS)
    rank.exporter.refresh(rank.pool)
    assert {label for name, label in rank.samples() if name == "faults_total"} == set(metrics.OPERATIONS)


def test_a_failure_costs_the_series_and_not_the_server(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "_exporter", rank.exporter)
    worker = SimpleNamespace(model_runner=SimpleNamespace(token_to_kv_pool=rank.pool))
    reporter: Any = SimpleNamespace(
        current_scheduler_metrics_enabled=False, scheduler=SimpleNamespace(tp_worker=worker)
    )
    rank.engine.counters = None  # type: ignore[assignment]
    metrics.refresh(reporter)  # another rank's series are filled, not this one's: nothing is tried
    assert not caplog.records and not rank.samples()
    reporter.current_scheduler_metrics_enabled = True
    for _ in range(2):
        metrics.refresh(reporter)
        metrics.forward(worker)
        metrics.batch_done(reporter)
        metrics.idle(reporter)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "stand still" in caplog.text


def test_what_the_device_noticed_is_told_when_the_scheduler_is_idle(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not anybody asks for metrics; once after a forward, for it waits for the device."""
    monkeypatch.setattr(runtime, "_engine", rank.engine)
    monkeypatch.setattr(metrics, "_exporter", None)
    monkeypatch.setattr(active, "active_config", lambda: ClusterKVConfig())
    worker: Any = SimpleNamespace(
        is_draft_worker=False,
        model_runner=SimpleNamespace(token_to_kv_pool=SimpleNamespace(wait_for_loads=lambda: None)),
    )
    batch: Any = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    reporter: Any = SimpleNamespace(current_scheduler_metrics_enabled=False)
    told = []
    for violations in (0, 2, 0, 1):
        rank.scene.index.violations[0] += violations
        runtime.before_forward(worker, batch)
        for _ in range(3):
            scheduler_hooks._after_idle(None, reporter)
            told.append(rank.engine.counters.build_conflicts)
            rank.scene.index.violations[1] += 1  # not looked at before the next forward
    assert told == [0, 0, 0, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    assert rank.engine.counters.index_violations == 9
    assert "2 pages were clustered while they were another segment's" in caplog.text


def test_a_pool_that_is_not_ours_has_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = SimpleNamespace(model_runner=SimpleNamespace(token_to_kv_pool=object()))
    metrics.forward(worker)  # nothing was made: metrics are off
    monkeypatch.setattr(metrics, "_exporter", object())
    metrics.forward(worker)


# ---- the table and the board


def without_tier(series: dict[str, Any]) -> dict[str, Any]:
    """The series that a server without a host tier has."""
    return {name: value for name, value in series.items() if "_host_" not in name}


def documented() -> dict[str, tuple[str, set[str]]]:
    """Series of docs/metrics.md -> its type and its own labels."""
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| (.*?) ?\| ", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def types_and_labels(families: Any) -> dict[str, tuple[str, set[str]]]:
    """The same of our series in a registry or a scrape."""
    found = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("sglang:clusterkv_") and not sample.name.endswith("_created"):
                found[sample.name] = (family.type, set(sample.labels) - set(LABELS))
    return found


def queries() -> Iterator[tuple[str, str, set[str]]]:
    """(where, expression, labels that the legend names)"""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            yield f"variable {variable['name']}", f"sum by ({label}) ({series})", set()


def series_of(expression: str) -> list[tuple[str, set[str]]]:
    """Names of series in a query, each with the labels that it must have: matched, or grouped by."""
    grouped = {label for by in re.findall(r"by \((.*?)\)", expression) for label in re.split(r",\s*", by)}
    return [
        (name, grouped | set(re.findall(r"(\w+)=~?\"", matchers)))
        for name, matchers in re.findall(r"(sglang:\w+)(?:\{(.*?)\})?", expression)
    ]


def test_the_table_lists_every_series(rank: Rank) -> None:
    rank.prefill()
    rank.decode()
    rank.engine.counters.dense_steps["dirty"] += 1
    rank.engine.counters.dense_layer_calls["sliding"] += 1
    rank.engine.counters.steps_without_graph["base"] += 1
    rank.exporter.refresh(rank.pool)
    assert without_tier(documented()) == types_and_labels(rank.registry.collect())
    rank.engine.tier = small_tier()
    rank.exporter.refresh(rank.pool)
    assert documented() == types_and_labels(rank.registry.collect())


def test_a_host_tiers_counts_are_counted_once(rank: Rank) -> None:
    tier = rank.engine.tier = small_tier()
    tier.reads[:] = torch.arange(1, 1 + len(tier.reads))
    tier.refills, tier.stored_pages = 7, torch.tensor(3)
    tier.directory.map(torch.tensor([4, 9]))
    for _ in range(2):
        rank.exporter.refresh(rank.pool)
        info, samples = tier.server_info(), rank.samples()
        assert samples["host_traffic_bytes_total", "write"] == info["written_bytes"] > 0
        assert samples["host_traffic_bytes_total", "read"] == info["read_bytes_decode"] > 0
        assert samples["host_traffic_bytes_total", "prefill"] == info["read_bytes_prefill"] > 0
        assert samples["host_traffic_bytes_total", "build"] == info["read_bytes_build"] > 0
        assert samples["host_recalled_rows_total", "device"] == info["recalled_rows_device"] == 1
        assert samples["host_recalled_rows_total", "host"] == info["recalled_rows_host"] == 2
        assert samples["host_dense_rows_total", ""] == info["dense_rows_host"] > 0
        assert samples["host_refills_total", ""] == 7
        assert samples["host_pages", "device"] == 2 and samples["host_pages", "host"] == 0
        assert samples["host_ring_level", ""] == 0.5 and samples["host_tier_bytes", ""] == tier.bytes
    tier.refills += 1
    rank.exporter.refresh(rank.pool)
    assert rank.samples()["host_refills_total", ""] == 8


def small_tier() -> Tier:
    """20 pages, of which 8 have room on the device and 4 are kept free."""
    buffers = [torch.zeros((9 * 16, 2, 32)) for _ in range(4)]
    return Tier(buffers[:2], buffers[2:], page_size=16, pages=21, ring_pages=4)


def test_the_board_can_be_imported_and_read() -> None:
    assert BOARD["schemaVersion"] >= 39 and BOARD["uid"] and BOARD["title"]
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        own = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not own & cells and at["x"] + at["w"] <= 24, panel["title"]
        cells |= own
    for panel in PANELS:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"] and panel["targets"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    shown = {name for _, expression, _ in queries() for name, _ in series_of(expression)}
    assert set(documented()) <= shown, "every series of ours has a panel"


def test_every_query_uses_declared_variables_and_its_legend_what_it_groups_by() -> None:
    known = {variable["name"] for variable in BOARD["templating"]["list"]} | OF_GRAFANA
    for where, expression, legend in queries():
        assert set(re.findall(r"\$(\w+)", expression)) <= known, where
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}"), where
        assert "_total" not in expression or "rate(" in expression.replace(" ", "") or "increase" in expression, where
        by = set(re.split(r",\s*", "".join(re.findall(r"by \((.*?)\)", expression))))
        assert legend <= by, where


def test_the_check_of_queries_notices() -> None:
    wanted = series_of('sum by (le, gone) (rate(sglang:a_bucket{x=~"$y", z="1"}[5m])) / sum (sglang:b)')
    assert wanted == [("sglang:a_bucket", {"le", "gone", "x", "z"}), ("sglang:b", {"le", "gone"})]
    with pytest.raises(AssertionError, match="label"):
        check_against({"sglang:a_bucket": {"le", "x", "z"}, "sglang:b": set()}, "here", wanted)
    with pytest.raises(AssertionError, match="series"):
        check_against({"sglang:b": set()}, "here", wanted)


def check_against(labels_of: dict[str, set[str]], where: str, wanted: list[tuple[str, set[str]]]) -> None:
    """Raise where a series or a label is not in a scrape."""
    for name, labels in wanted:
        assert name in labels_of, f"{where}: no series {name}"
        missing = labels - labels_of[name] - OF_PROMETHEUS
        assert not missing, f"{where}: {name} has no label {missing}"


# ---- a server


def scrape(server: Server) -> list[Any]:
    return list(text_string_to_metric_families(requests.get(f"{server.url}/metrics", timeout=60).text))


def samples_of(families: list[Any]) -> Samples:
    return {
        (s.name.removeprefix("sglang:clusterkv_"), "".join(v for k, v in s.labels.items() if k not in LABELS)): s.value
        for family in families
        for s in family.samples
        if s.name.startswith("sglang:clusterkv_")
    }


@pytest.mark.server
def test_a_live_server_has_what_the_table_and_the_board_name(demo_server: Server, text: list[int]) -> None:
    server = demo_server
    server.flush()
    server.generate(text[:100], 2)  # shorter than the budget
    server.generate(text[:560], 6)
    server.stream(text[:400] + text[2000:2080], 6)  # shares a prefix and cuts a segment
    time.sleep(1)  # the scheduler is idle, and nobody has asked for /server_info
    families = scrape(server)
    counts = server.counts()
    afterwards = samples_of(scrape(server))
    log = server.log.read_text()
    samples = samples_of(families)
    assert without_times(samples) == without_times(afterwards) == expected(counts)
    assert samples["build_seconds_total", ""] == pytest.approx(counts["build_ms"] / 1000, abs=1e-3)
    for name in ("sparse_steps_total", "tokens_reused_total", "splits_total", "clusters"):
        assert samples[name, ""] > 0, name
    assert samples["dense_steps_total", "budget"] > 0 and samples["dense_layer_calls_total", "first_layers"] > 0
    mass = {label: value for (name, label), value in samples.items() if name == "recalled_mass"}
    assert list(mass) == list(counts["recalled_mass"]) == ["0-7", "8-15", "16-23", "24-29"]
    assert all(0 < value <= 1 for value in [*mass.values(), *counts["recalled_mass"].values()])

    assert types_and_labels(families) == without_tier(documented())
    labels_of = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    tiers = {name: labels | set(LABELS) for name, (_, labels) in documented().items() if "_host_" in name}
    for where, expression, _ in queries():
        check_against(tiers | labels_of, where, series_of(expression))
    assert "Traceback" not in log and "stand still" not in log
