"""Our series on SGLang's own /metrics; docs/metrics.md has what they mean and what to do about them.

They exist where SGLang makes its scheduler collector (--enable-metrics), carry its labels, and are updated

- while batches run, at most every few seconds, at the reporter's points for prefill and decode, from a copy of the
  device's counts that was queued at the head of a forward: no step waits for the device;
- when the scheduler goes idle after a forward, so that the last values of a burst don't wait for the next one;
- when /server_info is asked.

The last two wait for the device. prometheus_client is imported when the collector is made: SGLang sets the folder of its
processes in the environment before that, and an earlier import would miss it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.memory.recalled_mass import mean_by_group
from sglang_clusterkv.memory.step import ListShape
from sglang_clusterkv.serving.ranks import OTHER_RANK
from sglang_clusterkv.serving.tier_metrics import PREFIX, TierSeries

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
    from sglang.srt.managers.tp_worker import TpModelWorker

    from sglang_clusterkv.clusters.engine import ClusterEngine
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.serving.pool import ClusterKVPool

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0

# Attribute of Counters -> name without prefix, meaning.
_TOTALS = {
    "segments": ("segments_total", "Segments that were clustered."),
    "tokens_clustered": ("tokens_clustered_total", "Tokens that were clustered."),
    "tokens_reused": ("tokens_reused_total", "Prompt tokens whose clusters were found in the prefix cache."),
    "tokens_recalled": ("tokens_recalled_total", "Clustered tokens that sparse steps recalled, per kv head and layer."),
    "tokens_available": ("tokens_available_total", "Clustered tokens that sparse steps could choose from."),
    "sparse_steps": ("sparse_steps_total", "Decode steps of a request that attended sparsely."),
    "recalled_extends": ("recalled_extends_total", "Prompts whose new tokens recalled (`recall_extend_tokens`)."),
    "recalled_extend_tokens": ("recalled_extend_tokens_total", "Their new tokens."),
    "splits": ("splits_total", "Segments that were cut by a shorter match."),
    "merges": ("merges_total", "Neighbouring segments that became one."),
    "forced_borders": (
        "forced_borders_total",
        "With `reproducible`: segments whose borders are another running request's.",
    ),
    "build_conflicts": (
        "build_conflicts_total",
        "Plan and device disagreed: segments left out, on an accelerator pages that were another segment's.",
    ),
    "index_violations": ("index_violations_total", "With CLUSTERKV_CHECK=1: indices that were out of range."),
    "build_s": ("build_seconds_total", "Time spent clustering, measured on a CPU only."),
}
# The same for attributes that count by a label, and the label.
_TOTALS_BY = {
    "dense_steps": ("dense_steps_total", "Decode steps of a request that attended to everything.", "reason"),
    "dense_layer_calls": ("dense_layer_calls_total", "The same of one layer in a sparse step.", "reason"),
    "steps_without_graph": (
        "steps_without_graph_total",
        "Decode steps that ran without a graph because captured ones had no room for them.",
        "reason",
    ),
    "faults": ("faults_total", "Exceptions of clusterkv's own code that were survived.", "operation"),
}
_GAUGES = {
    "clusters": "Clusters stored, over the layers and kv heads of the rank.",
    "bytes": "Bytes of the cluster index of the rank.",
    "running_reqs": "Requests that clusterkv follows.",
}
# Shown as 0 before the first one, so that an alert sees that one rise.
OPERATIONS = ("admit", "build", "copy", "cut", "free", "invalidate", "layer", "lists", "offload", "plan", "rewrite")
SHOWN = {"faults": OPERATIONS, "steps_without_graph": (*ListShape._fields, OTHER_RANK)}


class DeviceCounts:
    """A copy for the host of what the index counts on its device, queued behind the work that was queued before.

    Args:
        engine: its index is copied on its stream.
    """

    def __init__(self, engine: ClusterEngine) -> None:
        index = engine.index
        pinned = index.device != "cpu"
        self._mass = torch.empty(index.mass.shape, dtype=index.mass.dtype, pin_memory=pinned)
        self._pages = torch.empty((), dtype=torch.int64, pin_memory=pinned)
        self._violations = torch.empty(2, dtype=torch.int64, pin_memory=pinned)
        engine.stream.run(self._copy, index)
        self._ready = engine.stream.event()

    def _copy(self, index: ClusterIndex) -> None:
        self._mass.copy_(index.mass, non_blocking=True)
        self._pages.copy_(index.clustered_pages(), non_blocking=True)
        self._violations.copy_(index.violations, non_blocking=True)

    def has_arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self._ready.query()

    def read(self) -> tuple[np.ndarray, int, list[int]]:
        """`ClusterIndex.mass`, the number of clustered pages, and `ClusterIndex.violations`. Waits for the copy."""
        self._ready.synchronize()
        return self._mass.numpy(), int(self._pages), self._violations.tolist()


class Exporter:
    """The series of one scheduler process.

    Args:
        labels: name -> value, of every series.
        registry: of prometheus_client; None: its default, where SGLang's series are.
        interval_s: least time between two updates while batches run.
    """

    def __init__(self, labels: Mapping[str, Any], registry: Any = None, interval_s: float = INTERVAL_S) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge

        self._labels = dict(labels)
        self._interval_s = interval_s
        self._next_s = 0.0
        self._copy: DeviceCounts | None = None  # on its way
        self._behind = True  # a forward was launched since everything was published
        self._told: dict[tuple[str, ...], float] = {}  # (attribute, label's value) -> what the counter stands at
        self._mass = np.zeros(2)  # as last published
        self._registry = registry or REGISTRY
        self._tier: TierSeries | None = None  # made when a tier is first published
        names, registry = list(self._labels), self._registry

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(PREFIX + name, text, [*names, *more], registry=registry)

        def gauge(name: str, text: str, *more: str) -> Gauge:
            return Gauge(PREFIX + name, text, [*names, *more], registry=registry, multiprocess_mode="mostrecent")

        self._totals = {attribute: counter(*of) for attribute, of in _TOTALS.items()}
        self._totals_by = {attribute: counter(*of) for attribute, of in _TOTALS_BY.items()}
        self._gauges = {name: gauge(name, text) for name, text in _GAUGES.items()}
        self._recalled_mass = gauge(
            "recalled_mass",
            "Estimated share of the attention mass that sparse steps read exactly, since the last update.",
            "layers",
        )

    def forward(self, pool: ClusterKVPool) -> None:
        """A forward is launched: queue a copy of the device's counts if one is due. Call on the forward stream."""
        self._behind = True
        if self._copy is None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._interval_s
            self._copy = DeviceCounts(_engine(pool))

    def batch_done(self, pool: ClusterKVPool) -> None:
        """A batch's results are on the host: publish what was copied behind it or before.

        With overlap the copy may lie behind the next batch's clustering, which no step is to wait for: a later batch publishes.
        """
        if self._copy is not None and self._copy.has_arrived():
            self._publish(pool, self._copy)

    def idle(self, pool: ClusterKVPool) -> None:
        """Nothing runs: publish everything, once after the last forward."""
        if self._behind:
            self.refresh(pool)

    def refresh(self, pool: ClusterKVPool) -> None:
        """Publish everything as it is now; waits for the device."""
        self._publish(pool, DeviceCounts(_engine(pool)))
        self._behind = False

    def _publish(self, pool: ClusterKVPool, counts: DeviceCounts) -> None:
        engine = _engine(pool)
        self._copy = None
        mass, pages, violations = counts.read()
        engine.count_step()
        engine.counters.note_violations(*violations)
        for attribute, total in self._totals.items():
            self._raise(total, attribute, getattr(engine.counters, attribute))
        for attribute, total in self._totals_by.items():
            values = dict(getattr(engine.counters, attribute))
            values = dict.fromkeys(SHOWN.get(attribute, ()), 0) | values
            for value, count in values.items():
                self._raise(total, attribute, count, **{_TOTALS_BY[attribute][2]: value})
        self._gauges["clusters"].labels(**self._labels).set(pages * engine.index.clusters_of_a_page)
        self._gauges["bytes"].labels(**self._labels).set(engine.index.bytes)
        self._gauges["running_reqs"].labels(**self._labels).set(len(engine.records.rows))
        if engine.tier is not None:
            if self._tier is None:
                self._tier = TierSeries(self._labels, self._registry)
            self._tier.publish(engine.tier.server_info())
        for layers, mean in mean_by_group(mass - self._mass, pool.start_layer).items():
            self._recalled_mass.labels(**self._labels, layers=layers).set(mean)
        self._mass = mass

    def _raise(self, total: Any, attribute: str, count: float, **label: str) -> None:
        """Bring a counter up to `count`; the first time makes its series, even at 0."""
        key = (attribute, *label.values())
        total.labels(**self._labels, **label).inc(count - self._told.get(key, 0))
        self._told[key] = count


def _engine(pool: ClusterKVPool) -> ClusterEngine:
    assert pool.engine is not None
    return pool.engine


_exporter: Exporter | None = None


def collector_made(collector: Any) -> None:
    """SGLang made its scheduler collector: make our series beside its own."""
    global _exporter
    _exporter = Exporter(collector.labels)


def forward(worker: TpModelWorker) -> None:
    """A batch is launched; the current stream is the forward stream."""
    _update(Exporter.forward, worker)


def batch_done(reporter: SchedulerMetricsReporter) -> None:
    """A batch's results were reported."""
    if reporter.current_scheduler_metrics_enabled:  # SGLang updates its own series of this rank
        _update(Exporter.batch_done, reporter.scheduler.tp_worker)


def idle(reporter: SchedulerMetricsReporter) -> None:
    """The scheduler has nothing to do; called again and again."""
    if reporter.current_scheduler_metrics_enabled:
        _update(Exporter.idle, reporter.scheduler.tp_worker)


def refresh(reporter: SchedulerMetricsReporter) -> None:
    """Somebody asked for our counts elsewhere: the series are to say the same."""
    if reporter.current_scheduler_metrics_enabled:
        _update(Exporter.refresh, reporter.scheduler.tp_worker)


def _update(step: Callable[[Exporter, ClusterKVPool], None], worker: TpModelWorker) -> None:
    """Do one of the exporter's steps; a failure costs the series, not the server."""
    global _exporter
    pool = worker.model_runner.token_to_kv_pool
    if _exporter is None or getattr(pool, "engine", None) is None:
        return
    try:
        step(_exporter, pool)
    except Exception:
        _exporter = None
        logger.warning("clusterkv: the series of /metrics stand still from now on; please report this", exc_info=True)
