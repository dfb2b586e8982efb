"""What stands between a projection and the paged latent cache, at once: the latent's norm, the key's rotation, the write.

    latent = rms_norm(latent, weight);   k_rope = rotary(k_rope, cos, sin);   append_latent(cache, latent, k_rope, slots)

The cache is one of numbers or in FP8. What it saves: two launches; the normed latent and the rotated key are not read
again, and not written beside the cache where nobody else wants them.
Dims: T tokens, P pages, C latent rank, R rotary width, W bytes of a row in FP8.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2 and 3.1.2; rows as in ``append_latent`` and ``append_latent_fp8``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.sizes import check_value
from deepfuse.ir.tolerance import ONE_FLOAT8_STEP
from deepfuse.ops.append_latent import PAGE_SIZE, append_latent, appended_latent
from deepfuse.ops.append_latent_fp8 import (
    append_latent_fp8,
    appended_latent_fp8,
    cache_is_aligned,
    cache_views,
    is_in_fp8,
    num_scales,
    row_bytes,
)
from deepfuse.ops.rms_norm import normed_row, rms_norm_ref, row_tile
from deepfuse.ops.rms_norm_quantize import quantized_row
from deepfuse.ops.rotary import rotary_ref, rotated


def norm_rope_append_ref(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *kept, written = norm_rope_appended(cache, latent, k_rope, weight, cos, sin, slots, eps, interleaved, keep)
    cache.copy_(written)
    return kept[0], kept[1]


def norm_rope_appended(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The results, and the cache after the write as a new tensor: what the op means in a functional graph."""
    latent, k_rope = _normed_and_rotated(latent, k_rope, weight, cos, sin, eps, interleaved)
    appended = appended_latent_fp8 if is_in_fp8(cache) else appended_latent
    written = appended(cache, latent, k_rope, slots)
    return (latent, k_rope, written) if keep else (latent.new_empty(0), k_rope.new_empty(0), written)


def _normed_and_rotated(
    latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return rms_norm_ref(latent, weight, eps), rotary_ref(k_rope.unsqueeze(1), cos, sin, interleaved).squeeze(1)


@triton.jit
def _norm_rope_append_kernel(
    values_ptr, scales_ptr, rope_ptr, latent_ptr, k_rope_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, normed_ptr,
    rotated_ptr, page_stride, row_stride, latent_stride, k_rope_stride, cos_stride, sin_stride, C, R, eps,
    FP8: tl.constexpr, SCALES: tl.constexpr, INTERLEAVED: tl.constexpr, KEEP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per token. A cache in FP8 comes as three views, of float8, float32 and bfloat16."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    row = (slot // PAGE) * page_stride + (slot % PAGE) * row_stride
    c = tl.arange(0, BLOCK_C)
    latent = tl.load(latent_ptr + t * latent_stride + c, mask=c < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    # what is cached is the rounded result, which others may read too
    y = normed_row(latent, weight, C, eps).to(latent_ptr.dtype.element_ty)
    if KEEP:
        tl.store(normed_ptr + t * C + c, y, mask=c < C)
    if FP8:
        # NaN times zero is not zero
        y = tl.where(c < C, y.to(tl.float32), 0.0)
        values, scale = quantized_row(y, BLOCK_C, BLOCK_B, 448.0, False)
        # for rms_norm_quantize's reason
        side_by_side = c // VECTOR * VECTOR + c % VECTOR
        tl.store(values_ptr + row + side_by_side, values.to(values_ptr.dtype.element_ty), mask=c < C)
        b = tl.arange(0, BLOCK_B)
        tl.store(scales_ptr + (row + C) // 4 + b, scale, mask=b < SCALES)
        rope_row = rope_ptr + (row + C) // 2 + 2 * SCALES
    else:
        tl.store(values_ptr + row + c, y.to(tl.float32).to(values_ptr.dtype.element_ty), mask=c < C)
        rope_row = rope_ptr + row + C
    p, P = tl.arange(0, BLOCK_P), R // 2
    cos = tl.load(cos_ptr + t * cos_stride + p, mask=p < P, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * sin_stride + p, mask=p < P, other=0.0).to(tl.float32)
    k_row, kept_row = k_rope_ptr + t * k_rope_stride, rotated_ptr + t * R
    if INTERLEAVED:
        # whole rows, as in rotary
        r = tl.arange(0, 2 * BLOCK_P)
        k = tl.load(k_row + r, mask=r < R, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(k, (BLOCK_P, 2)))
        a, b = rotated(a, b, cos, sin)
        k = tl.reshape(tl.join(a, b), (2 * BLOCK_P,)).to(k_rope_ptr.dtype.element_ty)
        if KEEP:
            tl.store(kept_row + r, k, mask=r < R)
        tl.store(rope_row + r, k.to(tl.float32).to(rope_ptr.dtype.element_ty), mask=r < R)
    else:
        a = tl.load(k_row + p, mask=p < P, other=0.0).to(tl.float32)
        b = tl.load(k_row + P + p, mask=p < P, other=0.0).to(tl.float32)
        a, b = rotated(a, b, cos, sin)
        a, b = a.to(k_rope_ptr.dtype.element_ty), b.to(k_rope_ptr.dtype.element_ty)
        if KEEP:
            tl.store(kept_row + p, a, mask=p < P)
            tl.store(kept_row + P + p, b, mask=p < P)
        tl.store(rope_row + p, a.to(tl.float32).to(rope_ptr.dtype.element_ty), mask=p < P)
        tl.store(rope_row + P + p, b.to(tl.float32).to(rope_ptr.dtype.element_ty), mask=p < P)


def _launch(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = _fake(cache, latent, k_rope, weight, cos, sin, slots, eps, interleaved, keep)
    if slots.numel() == 0:
        return outputs
    # parts of the rows of one projection, and of wider tables: rows may be strided
    latent, k_rope, cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (latent, k_rope, cos, sin))
    C, R, fp8 = latent.shape[1], k_rope.shape[1], is_in_fp8(cache)
    # rms_norm's, which sums in this order
    block_c, num_warps = row_tile(C)
    _norm_rope_append_kernel[(slots.shape[0],)](
        *(cache_views(cache) if fp8 else (cache, cache, cache)), latent, k_rope, weight.contiguous(), cos, sin,
        slots.contiguous(), *outputs, cache.stride(0), cache.stride(1), latent.stride(0), k_rope.stride(0),
        cos.stride(0), sin.stride(0), C, R, eps, FP8=fp8, SCALES=num_scales(C), INTERLEAVED=interleaved, KEEP=keep,
        PAGE=PAGE_SIZE, BLOCK_C=block_c, BLOCK_B=max(block_c // 128, 1), BLOCK_P=triton.next_power_of_2(R // 2),
        VECTOR=16 // latent.element_size(), num_warps=num_warps,
    )  # fmt: skip
    return outputs


def _supports(cache: Tensor, latent: Tensor, *rest: Any) -> str | None:
    if torch.float64 in (cache.dtype, latent.dtype):
        return "computes in float32"
    if is_in_fp8(cache):
        return cache_is_aligned(cache)
    return None if cache.stride(2) == 1 else f"wants a cache with contiguous rows, not strides {list(cache.stride())}"


def _write(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    latent, k_rope = _normed_and_rotated(latent, k_rope, weight, cos, sin, eps, interleaved)
    (append_latent_fp8 if is_in_fp8(cache) else append_latent)(cache, latent, k_rope, slots)
    return (latent, k_rope) if keep else (latent.new_empty(0), k_rope.new_empty(0))


def _check(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> None:  # fmt: skip
    given = (cache, latent, k_rope, weight, cos, sin, slots)
    if (
        [t.ndim for t in given] != [3, 2, 2, 1, 2, 2, 1]
        or cache.shape[1] != PAGE_SIZE
        or weight.shape != latent.shape[1:]
        or k_rope.shape[1] % 2
        or [2 * t.shape[1] for t in (cos, sin)] != [k_rope.shape[1]] * 2
    ):
        raise ValueError(
            f"norm_rope_append: want cache [P, {PAGE_SIZE}, C + R or W], latent [T, C], k_rope [T, R] with even R, "
            f"weight [C], cos and sin [T, R/2] and slots [T], got {[list(t.shape) for t in given]}"
        )
    C, R = latent.shape[1], k_rope.shape[1]
    width = row_bytes(C, R) if is_in_fp8(cache) else C + R
    if cache.shape[2] != width or (is_in_fp8(cache) and C % 4):
        raise ValueError(
            f"norm_rope_append: want rows of C + R numbers, or of C + 4 ceil(C / 128) + 2 R bytes with C a multiple of "
            f"4, got {cache.shape[2]} of {cache.dtype} for C = {C} and R = {R}"
        )
    T = latent.shape[0]
    for rows in (t.shape[0] for t in (k_rope, cos, sin, slots)):
        check_value(rows == T, partial("norm_rope_append: want {} rows of everything, got {}".format, T, rows))
    if latent.dtype != k_rope.dtype or not latent.is_floating_point():
        raise TypeError(f"norm_rope_append: want latent and k_rope of one dtype, got {latent.dtype} and {k_rope.dtype}")
    if slots.dtype != torch.int64:
        raise TypeError(f"norm_rope_append: want int64 slots, got {slots.dtype}")


def _fake(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shapes = (latent.shape, k_rope.shape) if keep else ((0,), (0,))
    normed, turned = (torch.empty(shape, dtype=latent.dtype, device=latent.device) for shape in shapes)
    return normed, turned


def _cost(
    cache: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float,
    interleaved: bool, keep: bool,
) -> Cost:  # fmt: skip
    rows = slots.shape[0] * cache.shape[2] * cache.element_size()
    kept = tensor_bytes(latent, k_rope) if keep else 0
    # those of rms_norm, of rotary, and of quantize
    flops = 4 * latent.numel() + 3 * k_rope.numel() + (5 * latent.numel() if is_in_fp8(cache) else 0)
    return Cost(flops=flops, bytes=tensor_bytes(latent, k_rope, weight, cos, sin, slots) + rows + kept)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # one row; two blocks in FP8, the second not full; no rows; the widths of DeepSeek-V3, parts of one projection
    for T, C, R, fp8, interleaved, keep in [
        (1, 16, 8, False, True, True),
        (3, 16, 8, True, True, False),
        (5, 160, 4, True, False, True),
        (5, 24, 12, False, False, False),
        (0, 16, 8, False, True, True),
        (7, 512, 64, False, True, False),
        (7, 512, 64, True, True, True),
    ]:
        width, stored = (row_bytes(C, R), torch.uint8) if fp8 else (C + R, dtype)
        latent, k_rope = torch.randn(T, C + R, device=device, dtype=dtype).split([C, R], -1)
        angle = torch.rand(T, R // 2, device=device) * 6
        yield (
            torch.zeros(4, PAGE_SIZE, width, device=device, dtype=stored),
            latent,
            k_rope,
            torch.randn(C, device=device, dtype=dtype),
            angle.cos(),
            angle.sin(),
            torch.randperm(3 * PAGE_SIZE, device=device)[:T] + PAGE_SIZE,
            1e-6,
            interleaved,
            keep,
        )


norm_rope_append = define(
    "norm_rope_append(Tensor(a!) cache, Tensor latent, Tensor k_rope, Tensor weight, Tensor cos, Tensor sin, "
    "Tensor slots, float eps, bool interleaved, bool keep) -> (Tensor, Tensor)",
    reference=norm_rope_append_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    functional=norm_rope_appended,
    tolerance=ONE_FLOAT8_STEP,
    inline_reference=False,
)
"""Norm, rotate and append, as ``rms_norm``, ``rotary`` and ``append_latent`` (or ``append_latent_fp8``) do one by one.

Args:
    cache: ``[P, 64, C + R]``, or ``[P, 64, W]`` uint8; written in place.
    latent: ``[T, C]`` as the projection leaves it; rows may be strided. C is a multiple of 4 for a cache in FP8.
    k_rope: ``[T, R]``, likewise; dtype of ``latent``.
    weight: ``[C]`` of the norm.
    cos, sin: ``[T, R/2]``, of the angles of the tokens.
    slots: ``[T]`` int64, ``page * 64 + offset``; distinct but for those in page 0.
    eps: of the norm.
    interleaved: which channels of ``k_rope`` form a pair; see ``rotary``.
    keep: whether somebody else wants what is written, such as the attention of a prefill.

Returns:
    The normed latent ``[T, C]`` and the rotated key ``[T, R]``, contiguous, dtype of ``latent``; ``[0]`` without ``keep``.

Raises:
    ValueError: shapes do not fit.
    TypeError: ``latent`` and ``k_rope`` differ in dtype, or ``slots`` is not int64.
"""

norm_rope_append.provide("torch", _write, priority={"cpu": 5, "cuda": 5})
norm_rope_append.provide("triton", _launch, priority={"cuda": 10}, supports=_supports)
