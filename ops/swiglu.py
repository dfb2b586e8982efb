"""SwiGLU: ``y = silu(gate) * up`` with ``silu(g) = g * sigmoid(g)``.

Source: Shazeer 2020 (arXiv:2002.05202), section 2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    compute = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(compute), up.to(compute)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: want gate and up of one shape and dtype, got {list(gate.shape)} {gate.dtype} "
            f"and {list(up.shape)} {up.dtype}"
        )


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    compute = torch.promote_types(gate.dtype, torch.float32)
    g, u, d = gate.to(compute), up.to(compute), dy.to(compute)
    s = torch.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


def _cost(gate: Tensor, up: Tensor) -> Cost:
    return Cost(flops=6 * gate.numel(), bytes=3 * tensor_bytes(gate))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for shape in [(1, 8), (3, 100), (0, 16), (2, 3, 64)]:
        yield tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2))  # type: ignore[misc]
    # the two halves of one fused projection: strided rows
    yield torch.randn(5, 48, device=device, dtype=dtype).chunk(2, dim=-1)  # type: ignore[misc]


swiglu = define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    reference=swiglu_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Gated activation of a feed-forward block.

Args:
    gate, up: ``[..., I]``, one shape and dtype; rows may be strided (halves of one fused projection).

Returns:
    ``[..., I]``, contiguous, dtype of ``gate``; computed in float32.

Raises:
    ValueError: shapes or dtypes differ.
"""
