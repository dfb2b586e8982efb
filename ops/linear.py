"""Linear map: ``y = x @ weight.T (+ bias)``.

An op of its own, so that the matrix product of a decode step (few rows, bound by reading the weight) and that of a
prefill (many rows, bound by arithmetic) can go to different providers.
Dims: T rows (all leading dimensions), K inputs, N outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.private import materialize
from deepfuse.ir.provider import at_most

MATVEC_ROWS = 4
"""Up to so many rows a product is a reduction that streams the weight once (the rows stay in registers)."""


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map as a reduction for Inductor to fuse: with what makes the weight, too."""
    compute = torch.promote_types(x.dtype, torch.float32)
    # else the norm or the activation that made x would be computed again for each of the N sums
    rows_K, weight_NK = materialize(x.reshape(-1, x.shape[-1]).to(compute)).unbind(0), weight.to(compute)
    # one reduction a row, all over the same weight: Inductor fuses them into one loop that reads it once
    y = torch.stack([(weight_NK * row_K).sum(-1) for row_K in rows_K])
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def matvec_supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """``None`` where :func:`matvec` is the faster way, or why not."""
    rows = x.numel() // max(x.shape[-1], 1)
    return None if at_most(rows, MATVEC_ROWS) and rows > 0 else f"rows are not 1 to {MATVEC_ROWS}"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: want x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"linear: want x and weight of one dtype, got {x.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: want bias [N] = [{weight.shape[0]}], got {list(bias.shape)}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    dy_TN, x_TK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return (dy_TN @ weight).reshape(x.shape), dy_TN.t() @ x_TK, dy_TN.sum(0) if ctx.has_bias else None


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    N, K = weight.shape
    return Cost(flops=2 * rows * N * K, bytes=tensor_bytes(x, weight, bias) + rows * N * x.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    # K up to 256: the error of a sum grows with K, and the default tolerance is made for short sums
    for T, N, K, has_bias in [(1, 8, 16, False), (4, 12, 100, True), (0, 8, 16, False), (17, 33, 256, False)]:
        weight = torch.randn(N, K, device=device, dtype=dtype) / K**0.5
        bias = torch.randn(N, device=device, dtype=dtype) if has_bias else None
        yield torch.randn(T, K, device=device, dtype=dtype), weight, bias


linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Linear map of each row.

Args:
    x: ``[..., K]``.
    weight: ``[N, K]``, dtype of ``x``.
    bias: ``[N]`` or ``None``.

Returns:
    ``[..., N]``, dtype of ``x``.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ.
"""

linear.provide("matvec", matvec, priority={"cpu": 10}, supports=matvec_supports, inline=True)
