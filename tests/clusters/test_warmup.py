"""The kernels that a server runs are compiled when it starts, whatever its configuration.

Red when: the warm-up decodes densely, or misses a configuration that the server accepts; or when a request's length, its
place in a batch, or a segment's length makes Triton compile a kernel after it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from sglang_clusterkv.clusters import trace
from sglang_clusterkv.clusters.warmup import compile_kernels
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.cpu import dense_kernel
from sglang_clusterkv.kernels.decode.chain_cpu import chain_kernel
from sglang_clusterkv.kernels.extend.cpu import extend_kernel
from sglang_clusterkv.kernels.vectors_cpu import FLOAT32, INT4

MOST_AT_START, MOST_OF_LONG_CONTEXTS = 32, 36  # kernels


@pytest.mark.parametrize(
    "fields",
    [{}, {"dense_below_tokens": 10**6}, {"refine": False}, {"budget_tokens": 8192, "candidate_tokens": 8192}],
)
def test_any_configuration_is_warmed_up(fields: dict[str, object]) -> None:
    config = ClusterKVConfig(**fields)
    compile_kernels(
        config, "cpu", page_size=16, kv_heads=2, group=3, head_dim=64, dtype=torch.float32, context_tokens=8192
    )
    assert chain_kernel(64, 3, INT4, 2, FLOAT32).signatures


def test_what_a_trace_needs_is_compiled_where_traces_are_kept() -> None:
    for kept in (False, True):
        with patch.object(trace, "put_step") as step, patch.object(trace, "put_segment") as segment:
            config = ClusterKVConfig(trace=kept)
            compile_kernels(
                config, "cpu", page_size=16, kv_heads=2, group=3, head_dim=64, dtype=torch.float32, context_tokens=8192
            )
        assert step.called is kept and segment.called is kept


@pytest.mark.parametrize("host_dtype", ["auto", pytest.param("int8", marks=pytest.mark.long)])
def test_what_reads_a_host_tier_is_compiled_for_it(host_dtype: str) -> None:
    """Each format has types of its own, which numba compiles for; of the tiny model's kernels `make warm` has done so."""
    of_bits = {"auto": "float32", "int8": "int8"}[host_dtype]
    for kernel_of in (chain_kernel, dense_kernel, extend_kernel):
        kernel_of.cache_clear()  # other tests of this process have read tiers
    compile_kernels(
        ClusterKVConfig(),
        "cpu",
        page_size=16,
        kv_heads=2,
        group=2,
        head_dim=32,
        dtype=torch.float32,
        context_tokens=8192,
        host_dtype=host_dtype,
    )
    for kernel in (
        chain_kernel(32, 2, INT4, 2, FLOAT32),
        dense_kernel(32, 2, FLOAT32),
        extend_kernel(32, FLOAT32),
    ):
        seen = [str(argument) for signature in kernel.signatures for argument in signature]
        assert any(f"TierArrays(array(int64, 1d, C), array({of_bits}," in argument for argument in seen), seen


def test_triton_compiles_nothing_after_the_warm_up() -> None:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-m", "tests.support.launches"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["late"] == []
    first, *_, longest = found["at_start"]
    # A start waits for them, some two seconds of a core each: docs/gpu.md has how many.
    assert 15 < first <= MOST_AT_START and first + longest <= MOST_OF_LONG_CONTEXTS


def test_the_warm_up_says_what_it_is_and_passes_for_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compile_kernels(
            ClusterKVConfig(),
            "cpu",
            page_size=16,
            kv_heads=2,
            group=3,
            head_dim=64,
            dtype=torch.float32,
            context_tokens=8192,
        )
    first, *others = [record.message for record in caplog.records]
    assert "runs each kernel once" in first
    assert not any("request warm-up" in message for message in others), others
