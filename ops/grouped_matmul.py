"""A matrix of its own for each group of rows: ``y[m] = weight[group of m] @ x[m]``.

    group e owns rows offsets[e-1] .. offsets[e]

Dims: M rows, E groups (experts), K inputs, N outputs.
Source: Gale et al. 2022 (arXiv:2211.15841), section 4; offsets as in ``torch.nn.functional.grouped_mm``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most

GATHER_ROWS = 64
"""Up to so many rows each reads its group's weight in place, by index, as a fused reduction."""


def grouped_matmul_ref(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in groups(offsets):
        torch.mm(x[rows], weight[e].t(), out=y[rows])
    return y


def grouped_matmul_wgrad_ref(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweight = x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    for e, rows in groups(offsets):
        torch.mm(dy[rows].t(), x[rows], out=dweight[e])
    return dweight


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of each group that has rows."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            yield e, slice(begin, end)
        begin = end


def _gather(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Fused by Inductor into one loop: no copy of a weight is made."""
    compute = torch.promote_types(x.dtype, torch.float32)
    row_M = torch.arange(x.shape[0], device=x.device)
    group_M = (offsets[None] <= row_M[:, None]).sum(-1)
    weight_MNK = weight[group_M]
    return (weight_MNK.to(compute) * x.to(compute)[:, None]).sum(-1).to(x.dtype)


def _gather_supports(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    if not at_most(x.shape[0], GATHER_ROWS):
        return f"rows are not known to be at most {GATHER_ROWS}"
    return None


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        raise ValueError(
            "grouped_matmul: want x [M, K], weight [E, N, K] and offsets [E], got "
            f"{list(x.shape)}, {list(weight.shape)} and {list(offsets.shape)}"
        )
    if x.dtype != weight.dtype or offsets.dtype != torch.int32:
        raise TypeError(
            "grouped_matmul: want x and weight of one dtype and int32 offsets, got "
            f"{x.dtype}, {weight.dtype} and {offsets.dtype}"
        )


def _fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors
    return grouped_matmul(dy, weight.transpose(1, 2), offsets), grouped_matmul_wgrad(dy, x, offsets), None


def _cost(x: Tensor, weight: Tensor, offsets: Tensor) -> Cost:
    M, (E, N, K) = x.shape[0], weight.shape
    # with fewer rows than groups, at most one weight a row is read
    read = min(M, E) if isinstance(M, int) else E
    item = x.element_size()
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(x) + (read * N * K + M * N) * item)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # rows of each group: one row; empty groups; all in one; uneven, and more than a tile
    for counts, N, K in [([1], 8, 16), ([2, 0, 3, 1], 12, 20), ([0, 5, 0], 16, 8), ([0, 0], 8, 8), ([9, 70, 1], 40, 64)]:
        weight = torch.randn(len(counts), N, K, device=device, dtype=dtype) / K**0.5
        offsets = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        yield torch.randn(sum(counts), K, device=device, dtype=dtype), weight, offsets
        # the gradient's side: the same weight read transposed
        yield torch.randn(sum(counts), N, device=device, dtype=dtype), weight.transpose(1, 2), offsets


grouped_matmul = define(
    "grouped_matmul(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    reference=grouped_matmul_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
    inline_reference=False,
)
"""Multiply each group's rows by its matrix.

Args:
    x: ``[M, K]``, rows sorted by group.
    weight: ``[E, N, K]``, dtype of ``x``; may be transposed in its last two dimensions.
    offsets: ``[E]`` int32, end of each group's rows; the last is M. Stays on the device: no synchronisation.

Returns:
    ``[M, N]``, dtype of ``x``; accumulated in float32.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ, or ``offsets`` is not int32.
"""

grouped_matmul.provide("gather", _gather, priority={"cpu": 10}, supports=_gather_supports, inline=True)


def _wgrad_check(dy: Tensor, x: Tensor, offsets: Tensor) -> None:
    if dy.ndim != 2 or x.ndim != 2 or offsets.ndim != 1:
        raise ValueError(
            "grouped_matmul_wgrad: want dy [M, N], x [M, K] and offsets [E], got "
            f"{list(dy.shape)}, {list(x.shape)} and {list(offsets.shape)}"
        )


def _wgrad_fake(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], dy.shape[1], x.shape[1])


def _wgrad_cost(dy: Tensor, x: Tensor, offsets: Tensor) -> Cost:
    M, N, K, E = x.shape[0], dy.shape[1], x.shape[1], offsets.shape[0]
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(dy, x) + E * N * K * x.element_size())


def _wgrad_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for x, weight, offsets in _samples(device, dtype):
        dy = torch.randn(x.shape[0], weight.shape[1], device=device, dtype=dtype)
        # scaled so that sums over rows stay near one, where the default tolerance is made for
        yield dy / max(x.shape[0], 1) ** 0.5, x, offsets


grouped_matmul_wgrad = define(
    "grouped_matmul_wgrad(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    reference=grouped_matmul_wgrad_ref,
    check=_wgrad_check,
    fake=_wgrad_fake,
    cost=_wgrad_cost,
    samples=_wgrad_samples,
    inline_reference=False,
)
"""Gradient of ``grouped_matmul`` with respect to its weight: ``dweight[e] = sum over rows of e of dy[m] x[m]^T``.

Args:
    dy: ``[M, N]``; x: ``[M, K]``; offsets: ``[E]`` int32, as in ``grouped_matmul``.

Returns:
    ``[E, N, K]``, dtype of ``x``; zero for empty groups.
"""
