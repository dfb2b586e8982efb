"""SwiGLU: ``y = silu(gate) * up`` with ``silu(g) = g * sigmoid(g)``.

Dims: T tokens (all leading dimensions), F width.
Source: Shazeer 2020 (arXiv:2002.05202), section 2.
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


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    compute = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(compute), up.to(compute)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)


@triton.jit
def silu_times(g, u):
    """``silu(g) * u`` of float32 numbers."""
    return g * tl.sigmoid(g) * u


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, F, BLOCK_F: tl.constexpr):
    """One program per row and block of it."""
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    g = tl.load(gate_ptr + t * gate_stride + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + t * up_stride + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * F + f, silu_times(g, u).to(y_ptr.dtype.element_ty), mask=mask)


def _launch(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    gate_TF, up_TF = strided_rows(gate), strided_rows(up)
    F = gate.shape[-1]
    # 16 bytes a thread and input in bfloat16; small blocks, so that a decode step's few rows reach many processors
    block_f = min(triton.next_power_of_2(F), 1024)
    num_warps = max(block_f // 256, 1)
    _swiglu_kernel[(gate_TF.shape[0], triton.cdiv(F, block_f))](
        gate_TF, up_TF, y, gate_TF.stride(0), up_TF.stride(0), F, BLOCK_F=block_f, num_warps=num_warps
    )
    return y


def strided_rows(x: Tensor) -> Tensor:
    """``x`` as a matrix whose rows are contiguous; a copy where they are not."""
    x_TF = x.reshape(-1, x.shape[-1])
    return x_TF if x_TF.stride(-1) == 1 else x_TF.contiguous()


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.ndim < 1 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: want gate and up [..., F] of one shape and dtype, got {list(gate.shape)} {gate.dtype} "
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
    gate, up: ``[..., F]``, one shape and dtype; rows may be strided (halves of one fused projection).

Returns:
    ``[..., F]``, contiguous, dtype of ``gate``; computed in float32.

Raises:
    ValueError: shapes or dtypes differ.
"""

swiglu.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
