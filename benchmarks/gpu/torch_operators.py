"""The operators of SGLang's kernel package that a Llama needs, in torch: a kit's replacement for `sgl_kernel/load_utils.py`.

The package's own library is compiled for a newer torch than some GPU machines have.
"""

import types

import torch

_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")


def _normalised(x, weight, eps):  # type: ignore[no-untyped-def]
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _rmsnorm(out, input, weight, eps, enable_pdl):  # type: ignore[no-untyped-def]
    out.copy_(_normalised(input, weight, eps))


def _fused_add_rmsnorm(input, residual, weight, eps, enable_pdl):  # type: ignore[no-untyped-def]
    residual.add_(input)
    input.copy_(_normalised(residual, weight, eps))


def _silu_and_mul(out, input):  # type: ignore[no-untyped-def]
    gate, up = input.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate.float()).to(gate.dtype) * up)


def _weak_ref_tensor(x):  # type: ignore[no-untyped-def]
    return x.view(x.shape)


for _signature, _operator in (
    ("rmsnorm(Tensor! out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()", _rmsnorm),
    (
        "fused_add_rmsnorm(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
        _fused_add_rmsnorm,
    ),
    ("silu_and_mul(Tensor! out, Tensor input) -> ()", _silu_and_mul),
    ("weak_ref_tensor(Tensor(a) x) -> Tensor(a)", _weak_ref_tensor),
):
    _LIBRARY.define(_signature)
    _LIBRARY.impl(_signature.split("(")[0], _operator, "CompositeExplicitAutograd")


def _load_architecture_specific_ops():  # type: ignore[no-untyped-def]
    return types.SimpleNamespace()


def _preload_cuda_library():  # type: ignore[no-untyped-def]
    """Nothing to load."""
