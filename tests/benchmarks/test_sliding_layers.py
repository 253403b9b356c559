"""benchmarks/sliding_layers.py: what is clustered, and what its table says.

Red when: a layer that slides is clustered or has bytes, or the saving falls below five for one of Gemma 3's sizes.
"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import sliding_layers
from benchmarks.sliding_layers import MODELS, Model, Segment, token_bytes
from sglang_clusterkv.clusters import build
from sglang_clusterkv.config import ClusterKVConfig

SMALL = ClusterKVConfig(segment_tokens=64)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_bytes_are_those_of_the_layers_that_recall(model: Model) -> None:
    assert 5 * token_bytes(model, len(model.recalling)) < token_bytes(model, model.layers)


def test_only_layers_that_recall_are_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads = MODELS[1], []

    def counted(index: object, keys: torch.Tensor, values: torch.Tensor) -> build.SegmentTables:
        heads.append(len(keys))
        return cluster(index, keys, values)

    cluster = build.cluster_segment
    monkeypatch.setattr(build, "cluster_segment", counted)
    for layers, clustered in ((model.layers, None), (len(model.recalling), model.recalling)):
        heads.clear()
        assert Segment(model, clustered, SMALL).cluster_s() > 0
        assert sum(heads) == layers * model.kv_heads
    assert 5 * len(model.recalling) < model.layers


def test_the_table_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding_layers, "MODELS", MODELS[:1])
    *_, line = sliding_layers.table(1, SMALL).splitlines()
    assert line.startswith("| Gemma 3 1B | 4 of 26 | 3,342, 515 (1/6.5) |")
    all_s, some_s, ratio = map(float, re.search(r"([\d.]+), ([\d.]+) \(1/([\d.]+)\) \|$", line).groups())
    assert all_s > some_s and ratio > 1
