"""On our CPU platform SGLang's layers compute what their own `forward_native` does, by our kernels where these serve.

Red when: SGLang does not find our forward, a layer's result differs, or a call that the kernels do not serve (another type,
many tokens, a norm over part of the channels, offsets) reaches them.
"""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import patch

import pytest
import sglang.srt.platforms  # before SGLang's layers, which ask for the platform  # noqa: F401
import torch
from sglang.srt.layers import logits_processor
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.serving import cpu_layers, cpu_platform
from sglang_clusterkv.serving.cpu_platform import DISPATCH_KEY, ClusterKVCpuPlatform


@pytest.fixture(autouse=True)
def served_with_clusterkv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers, "_taken", False)
    monkeypatch.setattr(cpu_platform.active, "active_config", ClusterKVConfig)
    ClusterKVCpuPlatform().init_backend()
    ClusterKVCpuPlatform().post_load_model(torch.nn.Module())


def norm(**options: Any) -> RMSNorm:
    layer = RMSNorm(64, eps=1e-5, **options)
    torch.nn.init.normal_(layer.weight)
    return layer


def rotation(neox: bool = True) -> RotaryEmbedding:
    return RotaryEmbedding(32, 32, 512, 10000, neox, torch.float32)


def same(layer: Any, *arguments: Any, by_us: bool = True, **named: Any) -> None:
    """Ours gives what SGLang's own does, by our kernels or not."""
    ours = layer._oot_forward_registry[DISPATCH_KEY][type(layer)]
    with torch.no_grad():
        expected = layer.forward_native(*arguments, **named)
        with patch.object(type(layer), "forward_native", side_effect=layer.forward_native) as native:
            found = ours(layer, *arguments, **named)
    assert native.called is not by_us
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sglang_finds_them_by_the_platforms_key() -> None:
    assert ClusterKVCpuPlatform().get_dispatch_key_name() == DISPATCH_KEY
    for layer in (norm(), rotation()):
        with patch("sglang.kernels.fused_op._oot_dispatch_key", return_value=DISPATCH_KEY):
            method = layer._resolve_forward_method()
        assert method.__func__.__module__ == cpu_layers.__name__


@pytest.mark.parametrize("tokens", [1, 8])
def test_norms(tokens: int) -> None:
    x, residual = torch.randn(tokens, 64), torch.randn(tokens, 64)
    same(norm(), x)
    same(norm(), x, residual)


@pytest.mark.parametrize("tokens", [1, 8])
def test_gates(tokens: int) -> None:
    same(SiluAndMul(), torch.randn(tokens, 128))


@pytest.mark.parametrize("neox", [True, False])
def test_rotations_of_what_is_cut_from_one_product(neox: bool) -> None:
    q, k, _ = torch.randn(5, 192).split([96, 64, 32], dim=-1)
    same(rotation(neox), torch.tensor([3, 0, 511, 7, 7]), q, k)


class Quantized(UnquantizedLinearMethod):
    """Stands for a method of another kind."""


class QuantizedWords(UnquantizedEmbeddingMethod):
    """Likewise."""


def test_a_loaded_models_plain_layers_multiply_by_our_kernel() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 96) for _ in range(3)))
    for layer, method in zip(model, (UnquantizedLinearMethod(), Quantized(), None), strict=True):
        layer.quant_method = method
    ClusterKVCpuPlatform().post_load_model(model)
    assert type(model[1].quant_method) is Quantized and model[2].quant_method is None
    layer, method = model[0], model[0].quant_method
    few = [torch.randn(tokens, 64) for tokens in (1, 8)]
    many = [torch.randn(tokens, 64) for tokens in (9, 700)]
    others = [torch.randn(2, 3, 64), torch.randn(64, 2).T]
    with torch.no_grad():
        for kind, given in enumerate((few, many, others)):
            for x in given:
                with (
                    patch.object(cpu_layers, "linear", side_effect=cpu_layers.linear) as step,
                    patch.object(cpu_layers, "linear_by_tiles", side_effect=cpu_layers.linear_by_tiles) as tiles,
                ):
                    found = method.apply(layer, x, layer.bias)
                assert (step.called, tiles.called) == (kind == 0, kind == 1)
                torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


def test_logits_are_products_by_our_kernel_where_the_words_are_in_float32() -> None:
    plain, narrow, quantised = (torch.nn.Embedding(96, 64, dtype=dtype) for dtype in (None, torch.bfloat16, None))
    for layer in (plain, narrow):
        layer.quant_method = UnquantizedEmbeddingMethod()
    quantised.quant_method = QuantizedWords()
    ClusterKVCpuPlatform().post_load_model(torch.nn.Sequential(plain, narrow, quantised))
    assert type(narrow.quant_method) is UnquantizedEmbeddingMethod and type(quantised.quant_method) is QuantizedWords
    assert logits_processor.should_apply_lm_head_quant_method(plain, plain.quant_method)
    words = torch.tensor([5, 95])
    with torch.no_grad():
        assert torch.equal(plain.quant_method.embedding(plain, words), plain(words))
        for tokens in (1, 8, 9):
            x = torch.randn(tokens, 64)
            with patch.object(cpu_layers, "linear", side_effect=cpu_layers.linear) as ours:
                found = plain.quant_method.apply(plain, x, None)
            assert ours.called is (tokens < 9)
            torch.testing.assert_close(found, x @ plain.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, "served in bfloat16"), (torch.float32, "")])
def test_a_type_that_our_kernels_do_not_take_is_said(
    dtype: torch.dtype, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=cpu_layers.__name__):
        ClusterKVCpuPlatform().post_load_model(torch.nn.Linear(64, 96, dtype=dtype))
    assert (said in caplog.text) if said else not caplog.text


def test_with_another_backend_everything_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers, "_taken", False)
    monkeypatch.setattr(cpu_platform.active, "active_config", lambda: None)
    model = torch.nn.Linear(64, 96)
    model.quant_method = UnquantizedLinearMethod()
    ClusterKVCpuPlatform().post_load_model(model)
    assert type(model.quant_method) is UnquantizedLinearMethod
    x = torch.randn(4, 64)
    same(norm(), x, by_us=False)
    same(SiluAndMul(), x, by_us=False)
    same(rotation(), torch.arange(4), x, x, by_us=False)


def test_what_the_kernels_do_not_serve_is_sglangs() -> None:
    x = torch.randn(4, 64)
    many = torch.randn(cpu_layers.MOST_TOKENS + 1, 64)
    same(norm(), many, by_us=False)
    same(norm(), x.bfloat16(), by_us=False)
    same(norm(var_hidden_size=32), x, by_us=False)
    same(norm(), x, x, x, by_us=False)
    same(norm(), torch.randn(64, 4).T, by_us=False)
    same(SiluAndMul(), many, by_us=False)
    positions = torch.arange(4)
    same(rotation(), positions, x, x, positions, by_us=False)
    same(rotation(), positions, x.bfloat16(), x.bfloat16(), by_us=False)
    same(rotation(), positions.int(), x, x, by_us=False)
    assert cpu_layers.norm_forward(norm(), many).shape == many.shape
