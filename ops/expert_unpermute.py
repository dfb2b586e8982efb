"""Bring expert outputs back to their tokens: ``out[t] = sum_k weights[t, k] * y[inverse[t * K + k]]``.

The sum runs over k in order, so the result does not depend on how rows were scheduled.
Dims: T tokens, K experts per token, M = T * K rows, D width.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 12.
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
from deepfuse.ir.sizes import check_value


def expert_unpermute_ref(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    compute = torch.promote_types(y.dtype, torch.float32)
    y_TKD = y[inverse].unflatten(0, weights.shape).to(compute)
    return (y_TKD * weights.to(compute)[..., None]).sum(1).to(y.dtype)


@triton.jit
def _expert_unpermute_kernel(
    y_ptr, inverse_ptr, weights_ptr, out_ptr, y_stride, D, K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program per token and piece of its row; the sum is held in registers."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(K):
        row = tl.load(inverse_ptr + t * K + k)
        weight = tl.load(weights_ptr + t * K + k).to(tl.float32)
        acc += weight * tl.load(y_ptr + row * y_stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    (T, K), D = weights.shape, y.shape[1]
    out = y.new_empty(T, D)
    if out.numel() == 0:
        return out
    if y.stride(1) != 1:
        y = y.contiguous()
    # eight elements a thread, which is 16 bytes of bfloat16; wider rows go to several programs
    block_d = min(triton.next_power_of_2(D), 1024)
    _expert_unpermute_kernel[(T, triton.cdiv(D, block_d))](
        y,
        inverse.contiguous(),
        weights.contiguous(),
        out,
        y.stride(0),
        D,
        K=K,
        BLOCK_D=block_d,
        num_warps=max(block_d // 256, 1),
    )
    return out


def _check(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> None:
    if y.ndim != 2 or weights.ndim != 2 or inverse.ndim != 1 or order.shape != inverse.shape:
        raise ValueError(
            "expert_unpermute: want y [M, D], order [M], inverse [M] and weights [T, K], got "
            f"{[list(t.shape) for t in (y, order, inverse, weights)]}"
        )
    check_value(
        weights.numel() == inverse.shape[0],
        lambda: f"expert_unpermute: want T * K = {inverse.shape[0]} weights, got {list(weights.shape)}",
    )


def _fake(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, Tensor]:
    y, order, inverse, weights = ctx.saved_tensors
    compute = torch.promote_types(y.dtype, torch.float32)
    dout_MD = dout[order // weights.shape[1]].to(compute)
    dy = (dout_MD * weights.to(compute).flatten()[order][:, None]).to(y.dtype)
    dweights_M = (dout_MD * y.to(compute)).sum(-1)
    return dy, None, None, dweights_M[inverse].reshape(weights.shape).to(weights.dtype)


def _cost(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Cost:
    out = weights.shape[0] * y.shape[1] * y.element_size()
    return Cost(flops=2 * y.numel(), bytes=tensor_bytes(y, inverse, weights) + out)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    for T, K, D in [(1, 2, 8), (7, 3, 20), (0, 2, 8), (50, 4, 16)]:
        order = torch.randperm(T * K, device=device)
        weights = torch.rand(T, K, device=device, dtype=torch.promote_types(dtype, torch.float32))
        yield torch.randn(T * K, D, device=device, dtype=dtype), order, order.argsort(), weights


expert_unpermute = define(
    "expert_unpermute(Tensor y, Tensor order, Tensor inverse, Tensor weights) -> Tensor",
    reference=expert_unpermute_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Weighted sum of each token's expert outputs.

Args:
    y: ``[M, D]``, rows sorted by expert.
    order, inverse: ``[M]`` int64, from ``expert_permute`` (``order`` serves the gradient).
    weights: ``[T, K]``, any floating dtype.

Returns:
    ``[T, D]``, dtype of ``y``; summed in float32.

Raises:
    ValueError: shapes do not fit.
"""

expert_unpermute.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
