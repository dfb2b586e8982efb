"""Residual add followed by RMSNorm: ``h = x + residual; y = rms_norm(h)``; returns both.

Dims: T tokens (all leading dimensions), D width.
Source: the pre-norm decoder layer; the norm as in ``rms_norm``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ops.rms_norm import normed_row, rms_norm_grad, rms_norm_ref, row_tile


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h_TD = x + residual
    return rms_norm_ref(h_TD, weight, eps), h_TD


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, x_stride, residual_stride, D, eps, BLOCK_D: tl.constexpr
):
    """One program per token; the row is held in registers."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + t * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + t * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    h = (x + residual).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + t * D + d, h, mask=mask)
    # the norm is of the rounded sum, which is what the next layer reads
    h = h.to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + d, normed_row(h, weight, D, eps).to(y_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y)
    if y.numel() == 0:
        return y, h
    x_TD, residual_TD = (_rows(t) for t in (x, residual))
    block_d, num_warps = row_tile(D)
    _add_rms_norm_kernel[(x_TD.shape[0],)](
        x_TD,
        residual_TD,
        weight.contiguous(),
        y,
        h,
        x_TD.stride(0),
        residual_TD.stride(0),
        D,
        eps,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )
    return y, h


def _rows(x: Tensor) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()


def _check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    if x.ndim < 1 or x.shape != residual.shape or x.dtype != residual.dtype or weight.shape != x.shape[-1:]:
        raise ValueError(
            "add_rms_norm: want x and residual [..., D] of one dtype and weight [D], got "
            f"{list(x.shape)} {x.dtype}, {list(residual.shape)} {residual.dtype} and {list(weight.shape)}"
        )


def _fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty_like(y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    h, weight = ctx.saved_tensors
    dx, dweight = rms_norm_grad(dy, h, weight, ctx.eps)
    dx = dx + dh
    return dx, dx, dweight, None


def _cost(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Cost:
    return Cost(flops=5 * x.numel(), bytes=4 * tensor_bytes(x) + tensor_bytes(weight))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    for shape in [(1, 8), (3, 100), (0, 16), (2, 3, 64)]:
        x = torch.randn(shape, device=device, dtype=dtype)
        yield x, torch.randn_like(x), torch.randn(shape[-1], device=device, dtype=dtype), 1e-6


add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=add_rms_norm_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Residual add and RMSNorm of each row.

Args:
    x, residual: ``[..., D]``, one dtype; the sum is rounded to it before the norm.
    weight: ``[D]``, any floating dtype.
    eps: added to the mean square, in units of h**2.

Returns:
    ``(y, h)``, both ``[..., D]`` in the dtype of ``x``.

Raises:
    ValueError: shapes or dtypes differ.
"""

add_rms_norm.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
