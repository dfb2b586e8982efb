"""One decode step of absorbed attention and, of what it mixes, each head's values, in FP8 if asked for.

    mixed = mla_decode(...) or mla_decode_fp8(...);   y[b, h] = mixed[b, h] @ W_UV[h];   values, scale = quantize(y)

W_UV are rows of kv_b_proj. The kernel that mixes the splits multiplies: what it saves are two launches, a write and a
read of the mix, which is C numbers a head where the result is V, and of y; of a weight in FP8 the copy in the queries'
dtype, as in ``absorb_query``.
Dims: B sequences, H heads, C latent rank, R rotary width, N nope width, V value width, P pages a sequence, S splits.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2; quantize as in DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import Op, define
from deepfuse.ir.tolerance import Tolerance
from deepfuse.ops.absorbed_weight import (
    check_weight,
    per_head,
    sample_weight,
    weight_arguments,
    weight_bytes,
    weight_tile,
)
from deepfuse.ops.append_latent_fp8 import is_in_fp8
from deepfuse.ops.dequantize import in_memory
from deepfuse.ops.dot import dot
from deepfuse.ops.fp8_rounding import amax_bits, quotient_for_fp8, scale_from_amax_bits
from deepfuse.ops.head_matmul import head_matmul_ref
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8
from deepfuse.ops.mla_decode_splits import split_attention, splits_fit
from deepfuse.ops.quantize import check_blocks, empty_scale, quantize_ref, quantized_bytes


def mla_decode_project_ref(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float, weight: Tensor,
    weight_scale: Tensor | None, value_width: int, dtype: torch.dtype | None, power_of_two: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mixed_BHC = _decode_of(cache).reference(q_latent, q_rope, cache, block_table, seqlens, scale)
    w_uv_HVC = per_head(weight, weight_scale, q_latent.shape[1], q_latent.dtype)[:, -value_width:]
    y_BHV = head_matmul_ref(mixed_BHC, w_uv_HVC.transpose(1, 2))
    if dtype is None:
        return y_BHV, y_BHV.new_empty(0), y_BHV.new_empty(0, dtype=torch.float32)
    quantized = quantize_ref(y_BHV.flatten(1), dtype, 1, 128, power_of_two)
    return (y_BHV if keep else y_BHV.new_empty(0), *quantized)


@triton.jit(do_not_specialize=["NUM_SPLITS"])
def _mla_decode_project_kernel(
    partial_ptr, lse_ptr, weight_ptr, weight_scale_ptr, y_ptr, values_ptr, scale_ptr, weight_stride_row,
    weight_stride_c, weight_scale_stride_row, weight_scale_stride_c, num_weight_scales, scale_stride_b, scale_stride_k,
    B, H, NUM_SPLITS, HEAD_ROWS, V, C: tl.constexpr, FP8: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr,
    FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, PAD_SPLITS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program per head, block of sequences and block of values: the splits' weighted mean, times W^UV."""
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    v0, v, c = tl.program_id(2) * BLOCK_V, tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
    first_row = (h + 1) * HEAD_ROWS - V + v0
    weights = weight_ptr + (first_row + v[None, :]) * weight_stride_row + c[:, None] * weight_stride_c
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if PAD_SPLITS > 1:
        s = tl.arange(0, PAD_SPLITS)
        split_rows = (b[:, None] * NUM_SPLITS + s[None, :]) * H + h
        there = (b[:, None] < B) & (s[None, :] < NUM_SPLITS)
        lse = tl.load(lse_ptr + split_rows, mask=there, other=float("-inf"))
        share = tl.exp2(lse - tl.maximum(tl.max(lse, 1), -1e30)[:, None])
        total = tl.sum(share, 1)
        share /= tl.where(total == 0.0, 1.0, total)[:, None]
        # splits without tokens have written no partial sum
        partials = partial_ptr + split_rows[:, :, None] * C + c[None, None, :]
        live = (share > 0.0)[:, :, None]
    else:
        partials = partial_ptr + (b[:, None] * H + h) * C + c[None, :]
        live = b[:, None] < B
    y = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for start in range(0, C, BLOCK_C):
        if PAD_SPLITS > 1:
            partial = tl.load(partials, mask=live & (start + c < C)[None, None, :], other=0.0)
            mixed = tl.sum(share[:, :, None] * partial, 1).to(dtype)
        else:
            mixed = tl.load(partials, mask=live & (start + c < C)[None, :], other=0.0)
        if ROWS > BLOCK_B:
            # a product has 16 rows at least: the same sequences again
            again = tl.broadcast_to(mixed[None, :, :], (ROWS // BLOCK_B, BLOCK_B, BLOCK_C))
            mixed = tl.reshape(again, (ROWS, BLOCK_C))
        mask = (start + c < C)[:, None] & (v0 + v < V)[None, :]
        scale_ptrs = weight_scale_ptr + start // 128 * weight_scale_stride_c
        weight = weight_tile(
            weights, scale_ptrs, first_row, v[None, :], V - v0, mask, weight_scale_stride_row, num_weight_scales, FP8,
            dtype,
        )  # fmt: skip
        y = dot(mixed, weight, y, DOT_FLOAT32)
        partials += BLOCK_C
        weights += BLOCK_C * weight_stride_c
    row = tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + row
    mask_b = (row < BLOCK_B) & (b < B)
    places = (b[:, None] * H + h) * V + v0 + v[None, :]
    mask = mask_b[:, None] & (v0 + v < V)[None, :]
    # what is quantized is the rounded result, which others may read too
    y = y.to(dtype)
    if KEEP:
        tl.store(y_ptr + places, y, mask=mask)
    if QUANTIZE:
        y = y.to(tl.float32)
        scale, stored = scale_from_amax_bits(amax_bits(y, 1), FP8_MAX, POWER_OF_TWO)
        values = quotient_for_fp8(y, scale[:, None], FP8_MAX)
        tl.store(values_ptr + places, values.to(values_ptr.dtype.element_ty), mask=mask)
        tl.store(scale_ptr + b * scale_stride_b + (h * V + v0) // 128 * scale_stride_k, stored, mask=mask_b)


def _launch(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float, weight: Tensor,
    weight_scale: Tensor | None, value_width: int, dtype: torch.dtype | None, power_of_two: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, H, C), V = q_latent.shape, value_width
    outputs = _fake(
        q_latent, q_rope, cache, block_table, seqlens, scale, weight, weight_scale, V, dtype, power_of_two, keep
    )
    if B == 0:
        return outputs
    partial, lse = split_attention(q_latent, q_rope, cache, block_table, seqlens, scale)
    y, values, y_scale = outputs
    scale_strides = (0, 0) if dtype is None else y_scale.stride()
    head_rows, (weight, weights_scale, strides) = weight.shape[0] // H, weight_arguments(weight, weight_scale)
    num_splits = lse.shape[1]
    tiles = _tiles(B, num_splits, C, V, q_latent.dtype)
    _mla_decode_project_kernel[(H, triton.cdiv(B, tiles["BLOCK_B"]), triton.cdiv(V, tiles["BLOCK_V"]))](
        partial, lse, weight, weights_scale, y, values, in_memory(y_scale), *strides, *scale_strides, B, H, num_splits,
        head_rows, V, C=C, FP8=weight_scale is not None, KEEP=dtype is None or keep, QUANTIZE=dtype is not None,
        FP8_MAX=torch.finfo(dtype or torch.float8_e4m3fn).max, POWER_OF_TWO=power_of_two, DOT_FLOAT32=interpreted(),
        **tiles,
    )  # fmt: skip
    return outputs


def _tiles(B: int, num_splits: int, C: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks and warps: splits are all at hand, so that the partial sums of a step of C are loaded at once."""
    pad_splits = triton.next_power_of_2(num_splits)
    block_b = min(triton.next_power_of_2(B), max(128 // pad_splits, 1), 64)
    return {
        "PAD_SPLITS": pad_splits,
        "BLOCK_B": block_b,
        "BLOCK_V": min(max(triton.next_power_of_2(V), 16), 128),
        "BLOCK_C": min(max(triton.next_power_of_2(C), 16), 64 if dtype != torch.float32 and pad_splits <= 128 else 32),
        "ROWS": max(block_b, 16),
        "num_warps": 8,
        "num_stages": 3,
    }


def _decode_of(cache: Tensor) -> Op:
    """The op that reads a cache of this format."""
    return mla_decode_fp8 if is_in_fp8(cache) else mla_decode


def _check(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float, weight: Tensor,
    weight_scale: Tensor | None, value_width: int, dtype: torch.dtype | None, power_of_two: bool, keep: bool,
) -> None:  # fmt: skip
    decode = _decode_of(cache)
    decode.check(q_latent, q_rope, cache, block_table, seqlens, scale)
    check_weight("mla_decode_project", q_latent, weight, weight_scale, value_width)
    if weight.shape[1] != q_latent.shape[2] or value_width < 1:
        raise ValueError(
            f"mla_decode_project: want weight [H (N + V), C] with C = {q_latent.shape[2]} and V at least 1, got "
            f"{list(weight.shape)} and V = {value_width}"
        )
    if dtype is None:
        return
    check_blocks("mla_decode_project", dtype, 1, 128)
    if value_width % 128:
        raise ValueError(f"mla_decode_project: want whole blocks of 128 values to quantize, got V = {value_width}")


def _fake(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float, weight: Tensor,
    weight_scale: Tensor | None, value_width: int, dtype: torch.dtype | None, power_of_two: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, _ = q_latent.shape
    y = q_latent.new_empty((B, H, value_width) if dtype is None or keep else 0)
    if dtype is None:
        return y, q_latent.new_empty(0), q_latent.new_empty(0, dtype=torch.float32)
    values = torch.empty((B, H * value_width), dtype=dtype, device=q_latent.device)
    return y, values, empty_scale(values, 1, 128, power_of_two)


def _cost(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float, weight: Tensor,
    weight_scale: Tensor | None, value_width: int, dtype: torch.dtype | None, power_of_two: bool, keep: bool,
) -> Cost:  # fmt: skip
    (B, H, C), V = q_latent.shape, value_width
    decode = _decode_of(cache)
    cost = decode.cost(q_latent, q_rope, cache, block_table, seqlens, scale)
    # the mix of the splits is not written
    moved = weight_bytes(weight, weight_scale, H, V) - B * H * C * q_latent.element_size()
    flops = 2 * B * H * C * V + (0 if weight_scale is None else H * V * C)
    if dtype is None or keep:
        moved += B * H * V * q_latent.element_size()
    if dtype is not None:
        flops += 5 * B * H * V
        moved += quantized_bytes((B, H * V), 1, 128, power_of_two)
    return cost + Cost(flops=flops, bytes=moved)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    plain, fp8 = list(mla_decode.samples(device, dtype)), list(mla_decode_fp8.samples(device, dtype))
    # a weight of numbers and in FP8, heads whose rows lie across blocks of 128; one block of values a head, and two
    for args, kind, N, V, to, power_of_two, keep in [
        (plain[0], "numbers", 8, 12, None, False, True),
        (plain[1], "fp8", 40, 56, None, False, True),
        (plain[2], "fp8", 8, 128, e4m3, False, True),
        (plain[3], "numbers", 16, 256, e5m2, True, False),
        (fp8[0], "powers of two", 24, 130, None, False, True),
        (fp8[1], "fp8", 72, 128, e4m3, True, False),
        (fp8[3], "numbers", 16, 16, None, False, True),
    ]:
        weight = sample_weight(args[0].shape[1], N + V, args[0].shape[2], kind, device, dtype)
        yield *args, *weight, V, to, power_of_two, keep
    # no sequences
    empty = (*(t[:0] for t in plain[0][:2]), plain[0][2], *(t[:0] for t in plain[0][3:5]), 1.0)
    yield *empty, *sample_weight(2, 136, 16, "fp8", device, dtype), 128, e4m3, False, True


mla_decode_project = define(
    "mla_decode_project(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor block_table, Tensor seqlens, float scale, "
    "Tensor weight, Tensor? weight_scale, int value_width, ScalarType? dtype, bool power_of_two, bool keep)"
    " -> (Tensor y, Tensor values, Tensor scale)",
    reference=mla_decode_project_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    # y may be off by a unit of roundoff of bfloat16 of the largest number of its block, which is 448 (57344) steps of one;
    # and what it is rounded to by one value more. The largest number may pass a power of two, which doubles its scale
    tolerance={
        torch.float8_e4m3fn: Tolerance(atol=448 * 2**-8, rtol=2**-3),
        torch.float8_e5m2: Tolerance(atol=57344 * 2**-8, rtol=2**-2),
        torch.float8_e8m0fnu: Tolerance(atol=0.0, rtol=1.0),
    },
)
"""``mla_decode`` or ``mla_decode_fp8``, ``head_matmul`` by W^UV, and ``quantize`` of its result in blocks of 1 x 128.

Args:
    q_latent, q_rope, cache, block_table, seqlens, scale: of ``mla_decode``, or of ``mla_decode_fp8`` where the cache is
        bytes.
    weight: ``[H (N + V), C]`` of ``kv_b_proj``, of which the last V rows of each head are read; dtype of ``q_latent``,
        or FP8 with scales.
    weight_scale: ``[ceil(H (N + V) / 128), ceil(C / 128)]`` of blocks of 128x128, float32 or ``float8_e8m0fnu``.
    value_width: V.
    dtype, power_of_two: of ``quantize``, for which V must be a multiple of 128; without ``dtype`` there is none.
    keep: whether somebody else wants y too; without ``dtype`` it is what is wanted.

Returns:
    ``y [B, H, V]``, contiguous, dtype of ``q_latent``; ``values [B, H V]`` and ``scale [B, H V / 128]`` as ``quantize``
    gives them. What is not wanted is ``[0]``.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes other than these.
"""

mla_decode_project.provide("triton", _launch, priority={"cuda": 10}, supports=splits_fit)
