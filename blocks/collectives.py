"""Collectives as blocks write them, with gradients: functional ones, whose start and wait are nodes apart.

    all_to_all     rows to each process and from each; the gradient goes the other way
    sum_over       the sum of all processes' tensors; the gradient passes as it is         (ends a parallel region)
    same_over      a tensor that all processes have; its gradients are summed              (begins one)
    gather_rows    all processes' rows, one after the other; the gradient is summed and parted
    gather_columns all processes' columns, side by side, for all to go on with the same; the gradient is parted

Between a start and its wait a pass may put other work; nobody else reads what is on its way.
Source: torch/distributed/_functional_collectives.py; ``sum_over`` and ``same_over`` are g and f of Shoeybi et al. 2019
(arXiv:1909.08053), section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepfuse.blocks.axis import Axis
from deepfuse.ir.private import collectives


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    """``x [sum(sent), ...]``, rows for each process in order -> ``[sum(received), ...]``, rows from each in order.

    Args:
        received, sent: rows from and to each process of ``axis``; integers, or symbolic ones that are known to be >= 0.
    """
    return _AllToAll.apply(x.contiguous(), list(received), list(sent), axis.group)


def wait(x: Tensor) -> Tensor:
    """``x``, once the collective that makes it has ended."""
    return collectives.wait_tensor(x)


class _AllToAll(torch.autograd.Function):
    # torch's own differentiable collectives are other ops, of which Inductor does not know that memory is read until the wait
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.back = sent, received, group
        return wait(collectives.all_to_all_single(x, received, sent, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return wait(collectives.all_to_all_single(grads[0].contiguous(), *ctx.back)), None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return wait(collectives.all_gather_into_tensor(x, axis.size, axis.group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        axis = ctx.axis
        return wait(collectives.reduce_scatter_tensor(grads[0].contiguous(), "sum", axis.size, axis.group)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return wait(collectives.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return wait(collectives.all_reduce(grads[0].contiguous(), "sum", ctx.group)), None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[-1]
        rows = wait(collectives.all_gather_into_tensor(x.contiguous(), axis.size, axis.group))
        return rows.view(axis.size, *x.shape).movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].narrow(-1, ctx.axis.rank * ctx.width, ctx.width), None


def sum_over(x: Tensor, axis: Axis | None) -> Tensor:
    """Sum over the processes of ``axis``, each of which goes on with the same: so each gradient is the whole one.

    Here and in the others, ``None`` is a single process, for which nothing happens.
    """
    return x if axis is None else _Sum.apply(x.contiguous(), axis.group)


def same_over(x: Tensor, axis: Axis | None) -> Tensor:
    """``x``, which all processes of ``axis`` have, where each begins to compute something else of it."""
    return x if axis is None else _Same.apply(x, axis.group)


def largest_over(x: Tensor, axis: Axis | None) -> Tensor:
    """The largest of each number over the processes of ``axis``; without a gradient."""
    return x if axis is None else wait(collectives.all_reduce(x, "max", axis.group))


def gather_columns(x: Tensor, axis: Axis | None) -> Tensor:
    """``x [n, c] -> [n, size * c]``, of all processes in order, each of which goes on with the same."""
    return x if axis is None else _Columns.apply(x, axis)


def gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """``x [n, ...] -> [size * n, ...]``, of all processes in order; each computes something else of it."""
    return _Rows.apply(x.contiguous(), axis)
