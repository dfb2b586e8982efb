"""The query of absorbed attention: through ``W^UK`` into the latent's space, and its rotary part rotated.

    q_latent[t, h] = q_nope[t, h] @ W_UK[h],   q_rope[t, h] = rotary(q_rope[t, h]),   W_UK[h] = rows of kv_b_proj

What it saves: a launch, and, of a weight in FP8, another one and the copy in the queries' dtype, 2 bytes a number of the
whole ``kv_b_proj`` written and read at each step.
Dims: T tokens, H heads, N nope width, V value width, C latent rank, R rotary width, P = R/2 pairs.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2; the rotation as in ``rotary``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.sizes import check_value
from deepfuse.ops.absorbed_weight import check_weight, per_head, sample_weight, weight_arguments, weight_bytes
from deepfuse.ops.head_matmul import head_matmul_ref, head_product, tiles_for
from deepfuse.ops.rotary import rotary_ref, rotate_rows


def absorb_query_ref(
    q_nope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, weight: Tensor,
    weight_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (_, H, N), dtype = q_nope.shape, q_nope.dtype
    w_uk_HNC = per_head(weight, weight_scale, H, dtype)[:, :N]
    return head_matmul_ref(q_nope, w_uk_HNC), rotary_ref(q_rope, cos, sin, interleaved)


@triton.jit
def _absorb_query_kernel(
    q_nope_ptr, q_rope_ptr, cos_ptr, sin_ptr, weight_ptr, scale_ptr, q_latent_ptr, rotated_ptr, nope_stride_t,
    nope_stride_h, nope_stride_n, rope_stride_t, rope_stride_h, cos_stride, sin_stride, weight_stride_row,
    weight_stride_c, scale_stride_row, scale_stride_c, num_scales, T, H, N, C, P, HEAD_ROWS, FP8: tl.constexpr,
    INTERLEAVED: tl.constexpr, DOT_FLOAT32: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per head, block of tokens and block of the latent, as in head_matmul; and one more, which rotates."""
    h = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = t[:, None] < T
    if tl.program_id(2) == tl.num_programs(2) - 1:
        p = tl.arange(0, BLOCK_P)[None, :]
        cos = tl.load(cos_ptr + t[:, None] * cos_stride + p, mask=mask_t & (p < P), other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + t[:, None] * sin_stride + p, mask=mask_t & (p < P), other=0.0).to(tl.float32)
        q_rows = q_rope_ptr + t[:, None] * rope_stride_t + h * rope_stride_h
        y_rows = rotated_ptr + (t[:, None] * H + h) * (2 * P)
        rotate_rows(q_rows, y_rows, mask_t, cos, sin, P, INTERLEAVED, BLOCK_T, BLOCK_P)
    else:
        c0 = tl.program_id(2) * BLOCK_N
        c, n = c0 + tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
        q_tile = q_nope_ptr + h * nope_stride_h + t[:, None] * nope_stride_t + n[None, :] * nope_stride_n
        first_row = h * HEAD_ROWS
        weights = weight_ptr + (first_row + n[:, None]) * weight_stride_row + c * weight_stride_c
        y = head_product(
            q_tile, weights, scale_ptr + c0 // 128 * scale_stride_c, first_row, mask_t, c < C, BLOCK_K * nope_stride_n,
            BLOCK_K * weight_stride_row, scale_stride_row, num_scales, N, FP8, DOT_FLOAT32, BLOCK_T, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y_tile = q_latent_ptr + (t[:, None] * H + h) * C + c
        tl.store(y_tile, y.to(q_latent_ptr.dtype.element_ty), mask=mask_t & (c < C))


def _launch(
    q_nope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, weight: Tensor,
    weight_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, H, N), (rows, C), P = q_nope.shape, weight.shape, cos.shape[1]
    outputs = _fake(q_nope, q_rope, cos, sin, interleaved, weight, weight_scale)
    if T * H == 0:
        return outputs
    q_rope, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_rope, cos, sin))
    weight, scale, strides = weight_arguments(weight, weight_scale)
    tiles = tiles_for(T, C, N, q_nope.dtype, weight.dtype)
    _absorb_query_kernel[(H, triton.cdiv(T, tiles["BLOCK_T"]), triton.cdiv(C, tiles["BLOCK_N"]) + 1)](
        q_nope, q_rope, cos, sin, weight, scale, *outputs, *q_nope.stride(), q_rope.stride(0), q_rope.stride(1),
        cos.stride(0), sin.stride(0), *strides, T, H, N, C, P, rows // H, FP8=weight_scale is not None,
        INTERLEAVED=interleaved, DOT_FLOAT32=interpreted(), BLOCK_P=triton.next_power_of_2(max(P, 1)), **tiles,
    )  # fmt: skip
    return outputs


def _check(
    q_nope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, weight: Tensor,
    weight_scale: Tensor | None,
) -> None:  # fmt: skip
    given = (q_nope, q_rope, cos, sin)
    if (
        [t.ndim for t in given] != [3, 3, 2, 2]
        or q_nope.shape[1] != q_rope.shape[1]
        or [2 * t.shape[1] for t in (cos, sin)] != [q_rope.shape[2]] * 2
    ):
        raise ValueError(
            "absorb_query: want q_nope [T, H, N], q_rope [T, H, R] with even R, cos and sin [T, R/2], got "
            f"{[list(t.shape) for t in given]}"
        )
    T = q_nope.shape[0]
    for rows in (t.shape[0] for t in given[1:]):
        check_value(rows == T, partial("absorb_query: want {} rows of everything, got {}".format, T, rows))
    if q_nope.dtype != q_rope.dtype or not q_nope.is_floating_point():
        raise TypeError(f"absorb_query: want q_nope and q_rope of one dtype, got {q_nope.dtype} and {q_rope.dtype}")
    check_weight("absorb_query", q_nope, weight, weight_scale, q_nope.shape[2])


def _fake(
    q_nope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, weight: Tensor,
    weight_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_latent = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], weight.shape[1])
    return q_latent, torch.empty(q_rope.shape, dtype=q_rope.dtype, device=q_rope.device)


def _cost(
    q_nope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, weight: Tensor,
    weight_scale: Tensor | None,
) -> Cost:  # fmt: skip
    (T, H, N), C = q_nope.shape, weight.shape[1]
    # those of head_matmul, of rotary, and of dequantize
    flops = 2 * T * H * N * C + 3 * q_rope.numel() + (0 if weight_scale is None else H * N * C)
    given = tensor_bytes(q_nope, cos, sin) + 2 * tensor_bytes(q_rope) + weight_bytes(weight, weight_scale, H, N)
    return Cost(flops=flops, bytes=given + T * H * C * q_nope.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # one token; heads whose rows lie across blocks of 128; no tokens; several blocks of the latent; whole blocks
    for T, H, N, V, C, R, interleaved, kind in [
        (1, 2, 16, 8, 24, 8, True, "numbers"),
        (3, 5, 40, 56, 200, 4, False, "fp8"),
        (0, 2, 8, 8, 16, 4, True, "fp8"),
        (20, 3, 64, 32, 130, 12, True, "powers of two"),
        (5, 2, 128, 128, 128, 64, True, "fp8"),
        (7, 3, 12, 20, 40, 6, False, "numbers"),
    ]:
        angle = torch.rand(T, R // 2, device=device) * 6
        q_nope, q_rope = torch.randn(T, H, N + R, device=device, dtype=dtype).split([N, R], -1)
        weight = sample_weight(H, N + V, C, kind, device, dtype)
        yield q_nope, q_rope, angle.cos(), angle.sin(), interleaved, *weight


absorb_query = define(
    "absorb_query(Tensor q_nope, Tensor q_rope, Tensor cos, Tensor sin, bool interleaved, Tensor weight, "
    "Tensor? weight_scale) -> (Tensor, Tensor)",
    reference=absorb_query_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""``head_matmul`` by W^UK and ``rotary``; of a weight in FP8, with its ``dequantize`` to the queries' dtype.

Args:
    q_nope: ``[T, H, N]``, any strides.
    q_rope: ``[T, H, R]``, R even; dtype of ``q_nope``.
    cos, sin: ``[T, R/2]``, of the angles of the tokens.
    interleaved: which channels of ``q_rope`` form a pair; see ``rotary``.
    weight: ``[H (N + V), C]`` of ``kv_b_proj``, of which the first N rows of each head are read; dtype of ``q_nope``, or
        FP8 with scales.
    weight_scale: ``[ceil(H (N + V) / 128), ceil(C / 128)]`` of blocks of 128x128, float32 or ``float8_e8m0fnu``.

Returns:
    ``q_latent [T, H, C]`` and the rotated ``q_rope [T, H, R]``, contiguous, dtype of ``q_nope``.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes other than these.
"""

absorb_query.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
