"""Copies of weights in bf16 are read where they are the weights, and never when these may have changed.

Red when: a change of weights, by any of SGLang's ways to make one or by one that it does not tell of, leaves a copy in use; a
copy is made of weights that lose a bit, of an embedding that multiplies nothing, against the user's word or beyond its share of
memory; weights of another type than float32 are looked at, or memory is taken for those of a checkpoint in another type; a copy
is made anew for a request that leaves weights alone; or the installed SGLang's scheduler takes a request that no list has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import sglang.srt.platforms  # before SGLang's layers, which ask for the platform  # noqa: F401
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.managers import io_struct
from sglang.srt.model_executor.model_runner_components.weight_updater import _model_load_weights_direct
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.utils.weight_checker import WeightChecker

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.serving import active, cpu_layers, cpu_weights, scheduler_hooks
from sglang_clusterkv.serving.platform import BF16_WEIGHTS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers, "_taken", False)
    monkeypatch.setattr(scheduler_hooks, "_ours", True)
    monkeypatch.setattr(active, "active_config", ClusterKVConfig)
    monkeypatch.delenv(BF16_WEIGHTS, raising=False)


class Model(torch.nn.Module):
    """Embedding, one layer, logits; of weights that bf16 holds, but for `exact`'s."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens, self.layer, self.exact = (
            torch.nn.Embedding(96, 64),
            torch.nn.Linear(64, 96, bias=False),
            torch.nn.Linear(64, 32, bias=False),
        )
        self.lm_head = self.embed_tokens if tied else torch.nn.Embedding(96, 64)
        for part in (self.embed_tokens, self.lm_head):
            part.quant_method = UnquantizedEmbeddingMethod()
        for part in (self.layer, self.exact):
            part.quant_method = UnquantizedLinearMethod()
        for name, weight in self.named_parameters():
            weight.requires_grad_(False)
            if "exact" not in name:
                weight.copy_(weight.bfloat16())

    def load_weights(self, weights: Any) -> None:
        """As SGLang's models do."""
        _model_load_weights_direct(self, list(weights))


def taken(**options: bool) -> Model:
    model = Model(**options)
    cpu_layers.take_over(model)
    return model


def reads_copy(layer: Any) -> bool:
    """Whether its products read one; they must be right either way."""
    _, halved = layer.quant_method.weights(layer.weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ layer.weight.T, rtol=1e-5, atol=1e-4)
    return halved == 1


def test_weights_that_bf16_holds_are_read_from_copies(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = taken()
    assert reads_copy(model.layer) and reads_copy(model.lm_head) and not reads_copy(model.exact)
    assert model.embed_tokens.quant_method.halves is None
    assert "weights of 2 of 3 layers" in caplog.text
    copy = model.layer.quant_method.halves.of(model.layer.weight)
    copy.zero_()
    assert model.layer.quant_method.apply(model.layer, torch.randn(2, 64)).abs().max() == 0


def test_tied_words_have_one_copy() -> None:
    model = taken(tied=True)
    assert model.lm_head is model.embed_tokens and reads_copy(model.lm_head)


def test_none_against_the_users_word_or_beyond_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(BF16_WEIGHTS, "0")
    assert not reads_copy(taken().layer)
    monkeypatch.delenv(BF16_WEIGHTS)
    monkeypatch.setattr(cpu_weights.psutil, "virtual_memory", lambda: SimpleNamespace(available=90_000))
    with caplog.at_level(logging.INFO):
        assert not reads_copy(taken().layer)
    assert "more than a quarter" in caplog.text


def test_ranks_share_a_quarter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"layer": other(taken())[0][1]}
    room = int(2.5 * weights["layer"].nbytes // 2 / cpu_weights.MOST_OF_MEMORY)
    monkeypatch.setattr(cpu_weights.psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    assert cpu_weights.copies_of(weights, ranks=2) and not cpu_weights.copies_of(weights, ranks=3)


def other(model: Model, exact: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Other weights of the layer."""
    weight = torch.randn_like(model.layer.weight)
    return [("layer.weight", weight if exact else weight.bfloat16().float())]


def request(name: str) -> Any:
    return type(name, (), {})()


def asked(model: Model, name: str, change: Callable[[], Any]) -> None:
    """A request comes to the scheduler, and is done."""
    with patch("sglang_clusterkv.serving.request_checks.admit", lambda scheduler, received: received):
        assert scheduler_hooks._before_requests(SimpleNamespace(), [request(name)]) is not None
    change()


def from_disk(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    DefaultModelLoader.restore_weights_before_loading(model, CPU)
    DefaultModelLoader.load_weights_and_postprocess(model, iter(weights), CPU)


def in_a_session(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    DefaultModelLoader.restore_weights_before_loading(model, CPU)
    assert not reads_copy(model.layer)
    for name, value in weights:  # written by another process, with requests between
        half = len(value) // 2
        model.get_parameter(name).data[:half] = value[:half]
        assert not reads_copy(model.layer)
        model.get_parameter(name).data[half:] = value[half:]
    DefaultModelLoader.postprocess_weights(model, CPU)


def by_request(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    asked(model, "RpcReqInput", lambda: model.load_weights(weights))


def put_elsewhere(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    model.layer.weight.data = weights[0][1]


def another_parameter(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    model.layer.weight = torch.nn.Parameter(weights[0][1], requires_grad=False)


def in_place(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    model.layer.weight.copy_(weights[0][1])


def in_place_without_versions(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    with torch.inference_mode():
        model.layer.weight.copy_(weights[0][1])


def of_inference(model: Model, weights: list[tuple[str, torch.Tensor]]) -> None:
    with torch.inference_mode():
        model.layer.weight = torch.nn.Parameter(weights[0][1].clone(), requires_grad=False)


WAYS = [
    from_disk, in_a_session, by_request, put_elsewhere, another_parameter, in_place, in_place_without_versions,
    of_inference,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_no_change_of_weights_leaves_an_old_copy_in_use(way: Callable[..., None]) -> None:
    model = taken()
    assert reads_copy(model.layer)
    for exact, copied in ((False, True), (True, False), (False, True)):
        before = model.layer.weight.clone()
        way(model, other(model, exact))
        assert not torch.equal(model.layer.weight, before)
        assert reads_copy(model.layer) is copied


def test_random_weights_of_sglangs_checker_are_read() -> None:
    model = taken()
    with patch("sglang.srt.utils.weight_checker.get_parallel"):
        checker = WeightChecker(get_model=lambda: model)
    asked(model, "CheckWeightsReqInput", lambda: checker.handle("reset_tensors", role="target"))
    reads_copy(model.layer)
    reads_copy(model.lm_head)


def test_a_load_that_fails_is_read_as_far_as_it_came() -> None:
    model = taken()

    def broken() -> Any:
        yield from other(model)
        raise OSError

    DefaultModelLoader.restore_weights_before_loading(model, CPU)
    with pytest.raises(OSError):
        DefaultModelLoader.load_weights_and_postprocess(model, broken(), CPU)
    assert not reads_copy(model.layer)


def test_requests_that_change_no_weights_cost_nothing() -> None:
    model = taken()
    assert reads_copy(model.layer)
    with patch.object(cpu_weights, "halve", side_effect=AssertionError):
        for name in cpu_weights.LEAVE_WEIGHTS:
            asked(model, name, lambda: None)
            assert reads_copy(model.layer)


@pytest.mark.parametrize("name", sorted(cpu_weights.CHANGE_WEIGHTS))
def test_others_have_copies_made_anew(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = taken()
    caplog.clear()  # an earlier test of this process may have set the level that lets INFO through
    with caplog.at_level(logging.INFO), patch.object(cpu_weights, "halve", side_effect=cpu_weights.halve) as anew:
        asked(model, name, lambda: None)
        assert reads_copy(model.layer) and anew.call_count == 1
    assert not caplog.text and not cpu_weights.unknown


def test_a_request_that_no_list_has_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_weights, "unknown", type(cpu_weights.unknown)())
    model = taken()
    with caplog.at_level(logging.INFO), patch.object(cpu_weights, "halve", side_effect=cpu_weights.halve) as anew:
        for times in (1, 2):
            asked(model, "NewReqInput", lambda: None)
            assert reads_copy(model.layer) and anew.call_count == times
            result = SimpleNamespace(internal_state={})
            with patch("sglang_clusterkv.serving.metrics.refresh"):
                scheduler_hooks._after_internal_state(result, MagicMock())
            assert result.internal_state["clusterkv"]["unknown_requests"] == {"NewReqInput": times}
    assert caplog.text.count("NewReqInput") == 1


def test_every_request_of_the_installed_sglang_is_in_one_list() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    scheduler = MagicMock()
    Scheduler.init_request_dispatcher(scheduler)
    types = {kind.__name__ for kind in scheduler._request_dispatcher._mapping}
    listed = cpu_weights.LEAVE_WEIGHTS | cpu_weights.CHANGE_WEIGHTS
    assert len(types) > 40 and types <= listed, types - listed
    assert not cpu_weights.LEAVE_WEIGHTS & cpu_weights.CHANGE_WEIGHTS
    assert {name for name in listed if not hasattr(io_struct, name)} == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_another_type_are_not_looked_at(dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    with patch.object(cpu_weights, "halve", side_effect=AssertionError):
        cpu_layers.take_over(model)
        asked(model, "RpcReqInput", lambda: None)
        assert all(layer.quant_method.weights(layer.weight)[1] == 0 for layer in (model.layer, model.exact))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_checkpoint_of_another_type_takes_no_memory_and_is_looked_at_once(dtype: torch.dtype) -> None:
    model = Model()
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape).to(dtype))
    with patch.object(cpu_weights, "use_huge_pages", side_effect=AssertionError):
        cpu_layers.take_over(model)
    with patch.object(cpu_weights, "halve", side_effect=AssertionError):
        asked(model, "RpcReqInput", lambda: None)
        assert not reads_copy(model.layer) and not reads_copy(model.lm_head)


class OfOthers(torch.Tensor):
    """Made of other tensors, as quantised and distributed ones are: it says that it is float32, and has no numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OfOthers:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [one.inner if isinstance(one, OfOthers) else one for one in args]
        found = function(*args, **(kwargs or {}))
        return OfOthers(found) if function is torch.ops.aten.detach.default else found


def test_tensors_without_numbers_of_their_own_are_sglangs() -> None:
    model = Model()
    values = model.layer.weight.clone()
    model.layer.weight = torch.nn.Parameter(OfOthers(values), requires_grad=False)
    cpu_layers.take_over(model)
    assert model.layer.quant_method.halves is None
    x = torch.randn(3, 64)
    for many in (x, torch.randn(20, 64)):
        torch.testing.assert_close(model.layer.quant_method.apply(model.layer, many), many @ values.T)
    assert not cpu_weights.in_memory(torch.zeros(4, 4, device="meta")[1:]) and not cpu_weights.in_memory(
        torch.zeros(0, 4)
    )


@pytest.mark.parametrize("change", [lambda w: w.view(48, 128), lambda w: w[:48], lambda w: w.T])
def test_another_shape_at_the_same_place_is_no_copy(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = taken()
    assert reads_copy(model.layer)
    model.layer.weight.data = change(model.layer.weight.data)
    assert model.layer.quant_method.weights(model.layer.weight) == (model.layer.weight.data_ptr(), 0)


def test_another_parameter_where_the_old_one_was_is_no_copy() -> None:
    """Once the old one is gone, memory of its size is often found at its address."""
    model = Model()
    room = model.layer.weight.data.clone()
    old = model.layer.weight = torch.nn.Parameter(room, requires_grad=False)
    cpu_layers.take_over(model)
    assert reads_copy(model.layer)
    room.numpy()[:] = np.random.default_rng(3).standard_normal(room.shape)
    model.layer.weight = torch.nn.Parameter(room.detach(), requires_grad=False)
    assert (model.layer.weight.data_ptr(), model.layer.weight._version) == (old.data_ptr(), old._version)
    assert not reads_copy(model.layer)


def test_layers_that_share_weights_have_copies_that_follow_them() -> None:
    model = Model()
    model.exact = torch.nn.Linear(64, 48, bias=False)
    model.exact.quant_method = UnquantizedLinearMethod()
    model.exact.weight = torch.nn.Parameter(model.layer.weight[48:], requires_grad=False)  # within the other's
    cpu_layers.take_over(model)
    assert reads_copy(model.layer) and reads_copy(model.exact)
    for name, value in other(model):
        model.get_parameter(name).copy_(value)
    assert reads_copy(model.layer) and reads_copy(model.exact)


def test_weights_that_do_not_fit_at_first_take_no_memory_later() -> None:
    model = taken()
    model.exact.weight.copy_(model.exact.weight.bfloat16())
    assert not reads_copy(model.exact) and model.exact.quant_method.halves is None
