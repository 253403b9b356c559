"""The chain with FlashInfer's attend is the chain of references, for any mixture of requests; and falls to ours where it must.

FlashInfer is the stand-in of tests/support (the installed one with `--device cuda`). Red when its log-sum-exps are merged as
natural ones, a list names another head's row, the plan is made more than once per step, or a reason not to use it is not said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import flashinfer, triton_index
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.kernels.decode.triton import TritonDecoder, decoder_of, sparse_decode
from sglang_clusterkv.kernels.merge import triton as merge_triton
from tests.support import flashinfer_stand_in as stand_in
from tests.support.filled import LENGTHS, SCALE, Guarded, index_on, mixed, scene_of, step_on

CONFIG = ClusterKVConfig(
    budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20, attend_engine="flashinfer"
)
HEADS, GROUP, CHANNELS, DTYPE = 2, 3, 64, torch.float16  # the interpreter cuts bf16 off instead of rounding it


class Chain:
    """One step of two requests on one device."""

    def __init__(self, device: str, config: ClusterKVConfig = CONFIG, kinds: str = "ss") -> None:
        self.scene, step = scene_of(msgspec.structs.replace(config, attend_engine="auto"), CHANNELS, DTYPE, HEADS)
        self.index = index_on(self.scene.index, device)
        self.index.config = config
        self.step = step_on(step if kinds == "ss" else mixed(step, self.scene, kinds), device)
        self.sparse_step = step_on(step, device)
        self.pool = self.scene.keys[0].to(device), self.scene.values[0].to(device)
        generator = torch.Generator().manual_seed(3)
        self.q = torch.randn(step.batch, HEADS * GROUP, CHANNELS, generator=generator).to(device, DTYPE)
        self.guarded = Guarded(device)
        self.index.scratch["triton decoder", GROUP] = TritonDecoder(self.index, GROUP, self.guarded)

    def result(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        found = sparse_decode(self.q, *self.pool, self.index, 0, self.step, SCALE, sinks=sinks).float()
        self.guarded.assert_untouched()
        return found

    def expected(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """By the references, every request sparse."""
        return reference.sparse_decode(self.q, *self.pool, self.index, 0, self.sparse_step, SCALE, sinks=sinks).float()

    @property
    def engine(self) -> flashinfer.FlashInferAttend | None:
        return decoder_of(self.index, GROUP).engine


@pytest.fixture(autouse=True)
def _stand_in(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device == "cpu":
        stand_in.install(monkeypatch, HEADS)
    else:
        try:
            flashinfer.FlashInferAttend(HEADS, GROUP, CHANNELS, DTYPE, device)
        except Exception as error:
            pytest.skip(f"FlashInfer has no kernels here: {error}")
    monkeypatch.setattr(flashinfer, "_said", set())
    yield


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=3e-3, rtol=3e-3))


@pytest.mark.parametrize("fields", [{}, {"refine": False}, {"estimate": False}])
def test_the_chain_equals_the_reference(fields: dict[str, Any], device: str) -> None:
    chain = Chain(device, msgspec.structs.replace(CONFIG, **fields))
    result, mass = chain.result(), chain.index.mass[0].clone()
    chain.index.mass_cells.zero_()
    assert chain.engine is not None
    torch.testing.assert_close(result, chain.expected(), atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(mass, chain.index.mass[0], atol=2e-3 * float(mass[1]), rtol=0)
    if device == "cpu":
        (wrapper,) = stand_in.Wrapper.made
        chain.result()
        assert (wrapper.plans, wrapper.runs) == (2, 2), "one plan to load the kernels, and one per step"


@pytest.mark.parametrize("kinds", ["sd", "-s"])
def test_a_mixture_is_each_request_alone(kinds: str, device: str) -> None:
    chain = Chain(device, kinds=kinds)
    result, sparse = chain.result(), chain.expected()
    for b, kind in enumerate(kinds):
        if kind == "s":
            assert close(result[b], sparse[b])
        elif kind == "d":
            slots = chain.scene.slots(b + 1, LENGTHS[b]).to(device)[None]
            lengths = torch.tensor([LENGTHS[b]], device=device)
            whole = attend_reference.dense_decode(chain.q[b : b + 1], *chain.pool, slots, lengths, SCALE)
            assert close(result[b], whole[0].float())
        else:
            assert not result[b].any(), "padding gives 0"


def test_learned_sinks_join_behind_flashinfer(device: str) -> None:
    """They have no token, so no list has them; merge adds them in natural units."""
    chain = Chain(device)
    sinks = torch.linspace(-1, 6, HEADS * GROUP, device=device)
    assert close(chain.result(sinks), chain.expected(sinks)) and not close(chain.expected(sinks), chain.expected())


def test_natural_log_sum_exps_would_be_seen(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The mutants: whoever merges FlashInfer's as if they were natural, and a FlashInfer whose base is e."""
    chain = Chain(device)
    assert close(chain.result(), chain.expected())
    with monkeypatch.context() as broken:
        broken.setattr(merge_triton, "BINARY", merge_triton.NATURAL)
        assert not close(chain.result(), chain.expected())
    if device == "cpu":
        monkeypatch.setattr(stand_in.Wrapper, "base", 2.718281828)
        assert not close(chain.result(), chain.expected())


def test_another_heads_rows_would_be_seen(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The mutant: lists whose rows are those of the heads before."""
    written = triton_index.lay_out

    def of_other_heads(step: Any, w: Any, q: Any, indptr: torch.Tensor, indices: torch.Tensor, queries: Any) -> None:
        written(step, w, q, indptr, indices, queries)
        indices[int(indptr[1]) : int(indptr[2])] -= 1

    monkeypatch.setattr(flashinfer, "lay_out", of_other_heads)
    chain = Chain(device)
    if device == "cpu":
        with pytest.raises(AssertionError, match="another head's row"):
            chain.result()
    else:
        assert not close(chain.result(), chain.expected())


def test_a_reason_not_to_use_it_is_said_once_and_ours_attends(
    monkeypatch: pytest.MonkeyPatch, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(flashinfer.FlashInferAttend, "_plan_first", cannot)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            chain = Chain(device)
            assert close(chain.result(), chain.expected())
            assert chain.engine is None
    (line,) = [record.message for record in caplog.records if "attend_engine" in record.message]
    assert (
        "our own kernel attends: its kernels can neither be found nor compiled here (RuntimeError: no compiler)" in line
    )


def test_unless_it_is_asked_for_ours_attends(device: str) -> None:
    chain = Chain(device, msgspec.structs.replace(CONFIG, attend_engine="auto"))
    assert close(chain.result(), chain.expected())
    assert chain.engine is None
