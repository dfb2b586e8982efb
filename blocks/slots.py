"""Rows of tokens in slots, of which some stay empty, and tokens whose choices have no slot.

    to_slots:    out[s] = x[source[s] // K]                         0 where source[s] < 0
    from_slots:  out[t] = sum_k weights[t, k] * y[slot[t, k]]       nothing is added where slot[t, k] < 0

``source`` and ``slot`` are each other's inverse. Each gradient is the other function: it reads rows, and adds nothing
up by atomics, as that of indexing would. ``expert_permute`` and ``expert_unpermute`` do this where all slots are full.
Dims: T tokens, K choices per token, M = T * K, S slots, D width.
"""

from typing import Any

import torch
from torch import Tensor


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return fill(x, source, slot.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gradient_of_slots(grads[0], *ctx.saved_tensors), None, None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, source, slot, weights)
        return _collect(y, slot, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, source, slot, weights = ctx.saved_tensors
        compute = torch.promote_types(y.dtype, torch.float32)
        of_token = in_dtype(fill(grads[0], source, slot.shape[1]), compute)
        weight = in_dtype(weights, compute).flatten()[source.clamp(min=0)]
        dweights = _of_slots((of_token * in_dtype(y, compute)).sum(-1), slot)
        return in_dtype(of_token * weight[:, None], y.dtype), None, None, in_dtype(dweights, weights.dtype)


def to_slots(x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
    """``x [T, D]`` -> ``[S, D]``; ``source [S]`` int64, ``t * K + k`` or -1; ``slot [T, K]`` int64, or -1."""
    return _ToSlots.apply(x, source, slot)  # type: ignore[no-untyped-call, no-any-return]


def from_slots(y: Tensor, source: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
    """``y [S, D]``, ``weights [T, K]`` -> ``[T, D]``, dtype of ``y``; summed in float32, over k in order."""
    return _FromSlots.apply(y, source, slot, weights)  # type: ignore[no-untyped-call, no-any-return]


def fill(x: Tensor, source: Tensor, choices: int) -> Tensor:
    """:func:`to_slots` of any dtype, without a gradient."""
    return torch.where((source >= 0)[:, None], x[source.clamp(min=0) // choices], 0)


def gradient_of_slots(dout: Tensor, slot: Tensor) -> Tensor:
    """What :func:`to_slots` gives its ``x``."""
    compute = torch.promote_types(dout.dtype, torch.float32)
    return in_dtype(in_dtype(_of_slots(dout, slot), compute).sum(1), dout.dtype)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` where that is another tensor: torch 2.11's Dynamo loses the gradient of an autograd function in which a
    call returns what it was given."""
    return x if x.dtype == dtype else x.to(dtype)


def sources(slot: Tensor, slots: int) -> Tensor:
    """``[slots]`` int64: which ``t * K + k`` has the slot, or -1; of ``slot [T, K]``, which are different or -1."""
    # those without a slot meet in one more, which is cut off
    places = torch.where(slot < 0, slots, slot).flatten()
    empty = places.new_full((slots + 1,), -1)
    return empty.scatter(0, places, torch.arange(places.shape[0], device=slot.device))[:-1]


def _of_slots(y: Tensor, slot: Tensor) -> Tensor:
    """``[T, K, ...]``: each choice's row, 0 where it has none."""
    full = (slot >= 0).reshape(*slot.shape, *[1] * (y.ndim - 1))
    return torch.where(full, y[slot.clamp(min=0)], 0)


def _collect(y: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
    compute = torch.promote_types(y.dtype, torch.float32)
    return in_dtype((in_dtype(_of_slots(y, slot), compute) * in_dtype(weights, compute)[..., None]).sum(1), y.dtype)
