"""RMSNorm over the last dimension: ``y = x * rsqrt(mean(x**2) + eps) * weight``.

Dims: T tokens (all leading dimensions), D width.
Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
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


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # at least float32, and never down from float64: run in float64 this is the oracle of the tests
    compute = torch.promote_types(x.dtype, torch.float32)
    x_TD = x.to(compute)
    xhat_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    return (xhat_TD * weight.to(compute)).to(x.dtype)


@triton.jit
def normed_row(x, weight, D, eps):
    """The norm of a row in registers, float32; what lies past ``D`` must be zero."""
    inv_rms = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    return x * inv_rms * weight


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, x_stride, D, eps, BLOCK_D: tl.constexpr):
    """One program per token; the row is held in registers."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + t * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + d, normed_row(x, weight, D, eps).to(y_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x_TD = x.reshape(-1, D)
    if x_TD.stride(-1) != 1:
        x_TD = x_TD.contiguous()
    block_d, num_warps = row_tile(D)
    _rms_norm_kernel[(x_TD.shape[0],)](
        x_TD, weight.contiguous(), y, x_TD.stride(0), D, eps, BLOCK_D=block_d, num_warps=num_warps
    )
    return y


def row_tile(D: int) -> tuple[int, int]:
    """Elements and warps of a program that holds a row."""
    block_d = triton.next_power_of_2(D)
    # eight elements a thread up to 8 warps: enough loads in flight without spilling at D = 16384
    return block_d, min(max(block_d // 256, 1), 8)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: want x [..., D] and weight [D], got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"rms_norm: want a floating-point x, got {x.dtype}")


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``rms_norm`` with respect to ``x`` and ``weight``, in their dtypes."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x_TD, dy_TD = x.to(compute), dy.to(compute)
    inv_rms_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    xhat_TD = x_TD * inv_rms_T1
    dxhat_TD = dy_TD * weight.to(compute)
    dx_TD = inv_rms_T1 * (dxhat_TD - xhat_TD * (dxhat_TD * xhat_TD).mean(-1, keepdim=True))
    dweight_D = (dy_TD * xhat_TD).reshape(-1, x.shape[-1]).sum(0)
    return dx_TD.to(x.dtype), dweight_D.to(weight.dtype)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *rms_norm_grad(dy, x, weight, ctx.eps), None


def _cost(x: Tensor, weight: Tensor, eps: float) -> Cost:
    return Cost(flops=4 * x.numel(), bytes=2 * tensor_bytes(x) + tensor_bytes(weight))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, float]]:
    # one row; not a power of two; no rows; leading dimensions; the width of DeepSeek-V3
    for shape in [(1, 8), (3, 100), (0, 16), (2, 3, 64), (2, 7168)]:
        yield torch.randn(shape, device=device, dtype=dtype), torch.randn(shape[-1], device=device, dtype=dtype), 1e-6


rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=rms_norm_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""RMSNorm of each row.

Args:
    x: ``[..., D]``; float32, float16 or bfloat16 (float64 by the reference).
    weight: ``[D]``, any floating dtype.
    eps: added to the mean square, in units of x**2.

Returns:
    ``[..., D]``, contiguous, dtype and device of ``x``; statistics and product in float32.

Raises:
    ValueError: ``weight`` is not ``[D]``.
    TypeError: ``x`` is not floating point.
"""

rms_norm.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
