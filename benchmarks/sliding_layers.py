"""What it saves that layers with a sliding window are not clustered: index bytes and the time of one segment.

    python -m benchmarks.sliding_layers            # Gemma 3's sizes
    python -m benchmarks.sliding_layers --repeats 9

Clusters one segment of random keys twice, with all layers of the model and with those that recall, in turn, and takes the
least CPU time of each. One layer's keys stand for all, for their bytes do not count here.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch

from sglang_clusterkv.clusters.build import build_segments
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import Geometry, metadata_bytes_per_token
from sglang_clusterkv.memory.index import ClusterIndex

PAGE_SIZE = 16


class Model(NamedTuple):
    """Attention of a model, every `every`-th layer of which sees everything."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    every: int = 6

    @property
    def recalling(self) -> tuple[int, ...]:
        """Layers that recall."""
        return tuple(range(self.every - 1, self.layers, self.every))


MODELS = (
    Model("Gemma 3 1B", 26, 1, 256),
    Model("Gemma 3 4B", 34, 4, 256),
    Model("Gemma 3 12B", 48, 8, 256),
    Model("Gemma 3 27B", 62, 16, 128),
)


def token_bytes(model: Model, layers: int) -> int:
    """Of clusters, per token, where so many layers have any."""
    return metadata_bytes_per_token(
        ClusterKVConfig(), page_size=PAGE_SIZE, head_dim=model.head_dim, kv_heads=model.kv_heads, layers=layers
    )


class Segment:
    """One segment, to be clustered in some layers of a model."""

    def __init__(self, model: Model, clustered: tuple[int, ...] | None, config: ClusterKVConfig) -> None:
        pages = config.segment_tokens // PAGE_SIZE + 1
        geometry = Geometry(model.layers, model.kv_heads, model.head_dim, PAGE_SIZE, pages, clustered=clustered)
        self.index = ClusterIndex(config, geometry, "cpu")
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2, geometry.slots, model.kv_heads, model.head_dim, generator=generator)
        self.keys, self.values = ([part] * model.layers for part in rows)
        self.slots = torch.arange(PAGE_SIZE, geometry.slots)

    def cluster_s(self) -> float:
        """CPU time of all its layers, one at a time, as they are for the least memory."""
        begin = time.process_time()
        build_segments(self.index, [1], [self.slots], self.keys, self.values)
        return time.process_time() - begin


def times_s(model: Model, repeats: int, config: ClusterKVConfig) -> tuple[float, float]:
    """Of all layers, and of those that recall."""
    both = Segment(model, None, config), Segment(model, model.recalling, config)
    found = [[segment.cluster_s() for segment in both] for _ in range(1 + repeats)]
    return tuple(map(min, zip(*found[1:], strict=True)))


def table(repeats: int, config: ClusterKVConfig) -> str:
    """Markdown."""
    lines = [
        "| model | layers that recall | clusters, bytes per token: all layers, these | clustering a segment, CPU s |",
        "|---|---|---|---|",
    ]
    for model in MODELS:
        count = len(model.recalling)
        whole, part = token_bytes(model, model.layers), token_bytes(model, count)
        all_s, some_s = times_s(model, repeats, config)
        sizes = f"{whole:,}, {part:,} (1/{whole / part:.1f})"
        times = f"{all_s:.2f}, {some_s:.2f} (1/{all_s / some_s:.1f})"
        lines.append(f"| {model.name} | {count} of {model.layers} | {sizes} | {times} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    print(table(parser.parse_args(arguments).repeats, ClusterKVConfig()))


if __name__ == "__main__":
    main()
