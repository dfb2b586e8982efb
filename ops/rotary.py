"""Rotary position embedding: rotates pairs of channels by an angle proportional to the position.

    interleaved:  pairs are channels (2i, 2i+1)        (DeepSeek-V2 and V3)
    half-split:   pairs are channels (i, i + R/2)      (GPT-NeoX, Llama)

The layout of the output is that of the input. Dims: T tokens, H heads, R rotary width, P = R/2 pairs.
Source: Su et al. 2021 (arXiv:2104.09864), eq. 34; tables with YaRN in ``blocks/rotary.py``.
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


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    x_THR = x.to(compute)
    cos_T1P, sin_T1P = cos.to(compute).unsqueeze(1), sin.to(compute).unsqueeze(1)
    if interleaved:
        a, b = x_THR.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack((a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P), dim=-1).flatten(-2)
    else:
        a, b = x_THR.chunk(2, dim=-1)
        y = torch.cat((a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P), dim=-1)
    return y.to(x.dtype)


@triton.jit
def rotated(a, b, cos, sin):
    """Pairs (a, b) turned by an angle; all float32."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotate_rows(
    x_rows, y_rows, mask_rows, cos, sin, P, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Rows of ``2 P`` numbers at ``x_rows [ROWS, 1]``, turned and stored at ``y_rows``; cos and sin fit [ROWS, BLOCK_P]."""
    p = tl.arange(0, BLOCK_P)
    if INTERLEAVED:
        # whole rows, split in registers: neighbours would be two loads of every other element
        r = tl.arange(0, 2 * BLOCK_P)
        mask = mask_rows & (r < 2 * P)
        x = tl.load(x_rows + r, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ROWS, BLOCK_P, 2)))
        a, b = rotated(a, b, cos, sin)
        y = tl.reshape(tl.join(a, b), (ROWS, 2 * BLOCK_P))
        tl.store(y_rows + r, y.to(y_rows.dtype.element_ty), mask=mask)
    else:
        mask = mask_rows & (p < P)
        a = tl.load(x_rows + p, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_rows + P + p, mask=mask, other=0.0).to(tl.float32)
        a, b = rotated(a, b, cos, sin)
        tl.store(y_rows + p, a.to(y_rows.dtype.element_ty), mask=mask)
        tl.store(y_rows + P + p, b.to(y_rows.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    H,
    P,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per token and block of heads."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    p = tl.arange(0, BLOCK_P)
    cos = tl.load(cos_ptr + t * cos_stride + p, mask=p < P, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * sin_stride + p, mask=p < P, other=0.0).to(tl.float32)
    x_rows = x_ptr + t * x_stride_t + h[:, None] * x_stride_h
    y_rows = y_ptr + (t * H + h[:, None]) * (2 * P)
    rotate_rows(x_rows, y_rows, h[:, None] < H, cos, sin, P, INTERLEAVED, BLOCK_H, BLOCK_P)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    T, H, R = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    block_p = triton.next_power_of_2(R // 2)
    # 16 channels a thread: all heads of a narrow model in one program, 32 of DeepSeek-V3's 128
    block_h = min(triton.next_power_of_2(H), max(1024 // block_p, 1))
    num_warps = min(max(block_h * block_p // 256, 1), 4)
    _rotary_kernel[(T, triton.cdiv(H, block_h))](
        x,
        cos,
        sin,
        y,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        H,
        R // 2,
        INTERLEAVED=interleaved,
        BLOCK_H=block_h,
        BLOCK_P=block_p,
        num_warps=num_warps,
    )
    return y


def _check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    if x.ndim != 3 or x.shape[-1] % 2 or cos.ndim != 2 or cos.shape[1] * 2 != x.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            "rotary: want x [T, H, R] with even R, cos and sin [T, R/2], got "
            f"{list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )
    check_value(cos.shape[0] == x.shape[0], lambda: f"rotary: want {x.shape[0]} rows in cos, got {cos.shape[0]}")


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    # the inverse of a rotation is the rotation by minus the angle
    return rotary(dy, cos, -sin, ctx.interleaved), None, None, None


def _cost(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Cost:
    return Cost(flops=3 * x.numel(), bytes=2 * tensor_bytes(x) + tensor_bytes(cos, sin))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    for T, H, R in [(1, 1, 2), (5, 3, 16), (0, 2, 8), (7, 2, 12), (3, 4, 64)]:
        angle = torch.rand(T, R // 2, device=device) * 6
        x = torch.randn(T, H, R, device=device, dtype=dtype)
        for interleaved in (True, False):
            yield x, angle.cos(), angle.sin(), interleaved
    # the rotary part of a wider head: a strided view
    yield (
        torch.randn(4, 2, 24, device=device, dtype=dtype)[..., 8:],
        angle.cos()[:1, :8].expand(4, 8),
        angle.sin()[:1, :8].expand(4, 8),
        True,
    )


rotary = define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    reference=rotary_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Rotate each head.

Args:
    x: ``[T, H, R]``, R even; may be a strided view.
    cos, sin: ``[T, R/2]``, of the angles of the tokens; no gradient flows to them.
    interleaved: which channels form a pair (see above).

Returns:
    ``[T, H, R]``, contiguous, dtype of ``x``; computed in float32.

Raises:
    ValueError: shapes do not fit.
"""

rotary.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
