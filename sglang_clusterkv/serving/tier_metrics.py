"""The series of a host tier on /metrics; a server without one has none of them. docs/metrics.md has what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "sglang:clusterkv_"

# A counter's name without prefix, its meaning and its label; the label's values and what of `Tier.server_info` each is.
_TOTALS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "host_traffic_bytes_total",
        "Bytes of keys and values that went to the host tier and came from it.",
        "use",
        {
            "write": "written_bytes",
            "read": "read_bytes_decode",
            "prefill": "read_bytes_prefill",
            "build": "read_bytes_build",
        },
    ),
    (
        "host_recalled_rows_total",
        "Rows, one of a token, kv head and layer, that sparse steps recalled, by the tier they were read from.",
        "source",
        {"device": "recalled_rows_device", "host": "recalled_rows_host"},
    ),
    ("host_dense_rows_total", "Rows that dense steps read from the host tier.", "", {"": "dense_rows_host"}),
    ("host_refills_total", "Times that device pages were freed for the next forwards.", "", {"": "refills"}),
)
# The same of gauges.
_GAUGES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "host_pages",
        "Pages of the KV cache that are on the device, and those that are in host memory alone.",
        "tier",
        {"device": "pages_on_device", "host": "pages_on_host_only"},
    ),
    ("host_tier_bytes", "Bytes of the host tier of the rank.", "", {"": "bytes"}),
)


class TierSeries:
    """The series of one rank.

    Args:
        labels: name -> value, of every series.
        registry: of prometheus_client.
    """

    def __init__(self, labels: Mapping[str, Any], registry: Any) -> None:
        from prometheus_client import Counter, Gauge

        self._labels = dict(labels)
        self._told: dict[str, int] = {}  # what of `Tier.server_info` -> what its counter stands at

        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(PREFIX + name, text, [*self._labels, *filter(None, [label])], registry=registry)

        def gauge(name: str, text: str, label: str) -> Gauge:
            names = [*self._labels, *filter(None, [label])]
            return Gauge(PREFIX + name, text, names, registry=registry, multiprocess_mode="mostrecent")

        self._totals = [(counter(name, text, label), label, values) for name, text, label, values in _TOTALS]
        self._gauges = [(gauge(name, text, label), label, values) for name, text, label, values in _GAUGES]
        self._ring = gauge("host_ring_level", "Share of the device pages kept free for the next forward that are.", "")

    def publish(self, info: Mapping[str, int]) -> None:
        """Bring the series up to `Tier.server_info`."""
        for total, label, values in self._totals:
            for value, name in values.items():
                series = total.labels(**self._labels, **({label: value} if label else {}))
                series.inc(info[name] - self._told.get(name, 0))
                self._told[name] = info[name]
        for gauge, label, values in self._gauges:
            for value, name in values.items():
                gauge.labels(**self._labels, **({label: value} if label else {})).set(info[name])
        self._ring.labels(**self._labels).set(info["ring_level"] / info["ring_pages"])
