"""A matrix of its own for each head: ``y[t, h] = x[t, h] @ weight[h]``.

Absorbed attention applies ``W^UK`` to queries and ``W^UV`` to mixed latents this way.
Dims: T tokens, H heads, K inputs, N outputs.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most
from deepfuse.ops.linear import MATVEC_ROWS


def head_matmul_ref(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def _matvec(x: Tensor, weight: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight_HKN = weight.to(compute)
    return torch.stack([(x_HK.to(compute)[..., None] * weight_HKN).sum(1) for x_HK in x.unbind(0)]).to(x.dtype)


def _matvec_supports(x: Tensor, weight: Tensor) -> str | None:
    rows_fit = at_most(x.shape[0], MATVEC_ROWS) and x.shape[0] > 0
    return None if rows_fit else f"tokens are not 1 to {MATVEC_ROWS}"


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 3 or weight.ndim != 3 or x.shape[1:] != weight.shape[:2]:
        raise ValueError(
            f"head_matmul: want x [T, H, K] and weight [H, K, N], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"head_matmul: want x and weight of one dtype, got {x.dtype} and {weight.dtype}")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    dx = head_matmul(dy, weight.transpose(1, 2))
    return dx, torch.bmm(x.permute(1, 2, 0), dy.transpose(0, 1))


def _cost(x: Tensor, weight: Tensor) -> Cost:
    T, (H, K, N) = x.shape[0], weight.shape
    return Cost(flops=2 * T * H * K * N, bytes=tensor_bytes(x, weight) + T * H * N * x.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for T, H, K, N in [(1, 2, 16, 8), (3, 5, 12, 20), (0, 2, 8, 8), (20, 3, 64, 32)]:
        weight = torch.randn(H, K, N, device=device, dtype=dtype) / K**0.5
        yield torch.randn(T, H, K, device=device, dtype=dtype), weight
        # the other side of kv_b_proj: the same weight read transposed
        yield torch.randn(T, H, N, device=device, dtype=dtype), weight.transpose(1, 2)


head_matmul = define(
    "head_matmul(Tensor x, Tensor weight) -> Tensor",
    reference=head_matmul_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Multiply each head by its matrix.

Args:
    x: ``[T, H, K]``.
    weight: ``[H, K, N]``, dtype of ``x``; may be a strided view of a larger weight.

Returns:
    ``[T, H, N]``, contiguous, dtype of ``x``.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ.
"""

head_matmul.provide("matvec", _matvec, priority={"cpu": 10}, supports=_matvec_supports, inline=True)
