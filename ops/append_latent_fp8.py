"""Write the latents of new tokens into the paged latent cache in FP8: 656 bytes a token of DeepSeek-V3, not 1152.

    cache[slot // PAGE, slot % PAGE] = [values | scales | k_rope],   values, scales = quantize(latent)

A row is bytes: C of E4M3, a float32 scale for each 128 of them, and R of bfloat16, which stay in high precision since
positions do not bear rounding. Page 0 belongs to nobody, as in ``append_latent``.
Dims: T tokens, P pages, C latent rank, R rotary width, W = C + 4 ceil(C / 128) + 2 R bytes of a row.
Source: FlashMLA's FP8 cache (github.com/deepseek-ai/FlashMLA, README.md), so that caches can be shared with it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.dequantize import dequantize_ref
from deepfuse.ops.fp8_rounding import amax_bits, quotient_for_fp8, scale_from_amax_bits
from deepfuse.ops.quantize import quantize_ref


def append_latent_fp8_ref(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    cache.copy_(appended_latent_fp8(cache, latent, k_rope, slots))


def appended_latent_fp8(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> Tensor:
    """The cache after the write, as a new tensor: what the op means in a functional graph."""
    return cache.index_put((slots // PAGE_SIZE, slots % PAGE_SIZE), packed_rows(latent, k_rope))


def packed_rows(latent: Tensor, k_rope: Tensor) -> Tensor:
    """Rows of the cache, ``[T, W]`` bytes."""
    values_TC, scales = quantize_ref(latent, torch.float8_e4m3fn, 1, 128, False)
    return torch.cat([values_TC.view(torch.uint8), bytes_of(scales), bytes_of(k_rope.to(torch.bfloat16))], dim=-1)


def bytes_of(x: Tensor) -> Tensor:
    """``[T, N]`` float32 or bfloat16 -> ``[T, N * itemsize]``, the lowest byte of each number first.

    By shifts, which Inductor fuses, and which leave it the choice of strides; a view as bytes wants contiguous numbers,
    which a column of one is to Inductor whatever its stride.
    """
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16)
    places = torch.arange(0, 8 * x.element_size(), 8, dtype=bits.dtype, device=x.device)
    return ((bits[..., None] >> places) & 255).to(torch.uint8).flatten(-2)


def numbers_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``bytes_of`` undone: ``[T, N * itemsize]`` bytes -> ``[T, N]`` of float32 or bfloat16."""
    integers = torch.int32 if dtype.itemsize == 4 else torch.int16
    places = torch.arange(0, 8 * dtype.itemsize, 8, dtype=integers, device=x.device)
    return (x.unflatten(-1, (-1, dtype.itemsize)).to(integers) << places).sum(-1, dtype=integers).view(dtype)


def unpacked_rows(rows: Tensor, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents ``[..., C]`` and rotated keys ``[..., R]`` of rows ``[..., W]`` of the cache."""
    values, scales, k_rope = row_parts(rows.reshape(-1, rows.shape[-1]), C)
    latent = dequantize_ref(values, scales, 1, 128, dtype)
    return latent.unflatten(0, rows.shape[:-1]), k_rope.to(dtype).unflatten(0, rows.shape[:-1])


def row_parts(rows: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """What lies in rows ``[T, W]``: values ``[T, C]``, scales ``[T, ceil(C / 128)]`` and rotated keys ``[T, R]``."""
    values, scales, k_rope = rows.split([C, 4 * num_scales(C), rows.shape[1] - C - 4 * num_scales(C)], dim=-1)
    return (
        values.contiguous().view(torch.float8_e4m3fn),
        numbers_of(scales, torch.float32),
        numbers_of(k_rope, torch.bfloat16),
    )


def is_in_fp8(cache: Tensor) -> bool:
    """Whether a latent cache has this format; otherwise it is one of numbers, as ``append_latent`` writes it."""
    return cache.dtype == torch.uint8


def num_scales(C: int) -> int:
    return (C + 127) // 128


def row_bytes(C: int, R: int) -> int:
    """W: bytes of a row."""
    return C + 4 * num_scales(C) + 2 * R


@triton.jit
def _append_latent_fp8_kernel(
    values_ptr, scales_ptr, rope_ptr, latent_ptr, k_rope_ptr, slots_ptr, page_bytes, row_bytes, latent_stride,
    k_rope_stride, C, R, SCALES: tl.constexpr, PAGE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per token. The cache comes as three views, of float8, float32 and bfloat16."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    row = (slot // PAGE) * page_bytes + (slot % PAGE) * row_bytes
    b, r = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_R)
    c = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    latent = tl.load(latent_ptr + t * latent_stride + c, mask=c < C, other=0.0).to(tl.float32)
    k_rope = tl.load(k_rope_ptr + t * k_rope_stride + r, mask=r < R, other=0.0).to(tl.float32)
    scale, stored = scale_from_amax_bits(amax_bits(latent, 1), 448.0, False)
    values = quotient_for_fp8(latent, scale[:, None], 448.0)
    tl.store(values_ptr + row + c, values.to(values_ptr.dtype.element_ty), mask=c < C)
    tl.store(scales_ptr + (row + C) // 4 + b, stored, mask=b < SCALES)
    tl.store(rope_ptr + (row + C) // 2 + 2 * SCALES + r, k_rope.to(rope_ptr.dtype.element_ty), mask=r < R)


def _launch(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    if slots.numel() == 0:
        return
    # both are often parts of the rows of one projection, so rows may be strided
    latent, k_rope = (t if t.stride(1) == 1 else t.contiguous() for t in (latent, k_rope))
    C, R = latent.shape[1], k_rope.shape[1]
    blocks = triton.next_power_of_2(num_scales(C))
    _append_latent_fp8_kernel[(slots.shape[0],)](
        *cache_views(cache), latent, k_rope, slots.contiguous(), cache.stride(0), cache.stride(1), latent.stride(0),
        k_rope.stride(0), C, R, SCALES=num_scales(C), PAGE=PAGE_SIZE, BLOCK_B=blocks,
        BLOCK_R=triton.next_power_of_2(R), num_warps=1 if blocks <= 2 else 2,  # eight elements a thread at C = 512
    )  # fmt: skip


def cache_views(cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bytes as float8, float32 and bfloat16."""
    return cache.view(torch.float8_e4m3fn), cache.view(torch.float32), cache.view(torch.bfloat16)


def cache_is_aligned(cache: Tensor) -> str | None:
    """Why kernels do not read this cache where it lies, or ``None``."""
    if cache.stride(2) != 1:
        return f"wants a cache with contiguous rows, not strides {list(cache.stride())}"
    if any(stride % 4 for stride in cache.stride()[:2]):
        return f"wants pages and rows at multiples of 4 bytes, not {list(cache.stride()[:2])}"
    return None


def _supports(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> str | None:
    return "computes in float32" if latent.dtype == torch.float64 else cache_is_aligned(cache)


def _append(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    cache.index_put_((slots // PAGE_SIZE, slots % PAGE_SIZE), packed_rows(latent, k_rope))


def _check(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    if cache.ndim != 3 or cache.shape[1] != PAGE_SIZE or latent.ndim != 2 or k_rope.ndim != 2 or slots.ndim != 1:
        raise ValueError(
            f"append_latent_fp8: want cache [P, {PAGE_SIZE}, W], latent [T, C], k_rope [T, R] and slots [T], got "
            f"{list(cache.shape)}, {list(latent.shape)}, {list(k_rope.shape)} and {list(slots.shape)}"
        )
    check_row("append_latent_fp8", cache, latent.shape[1], k_rope.shape[1])
    if slots.dtype != torch.int64:
        raise TypeError(f"append_latent_fp8: want int64 slots, got {slots.dtype}")


def check_row(op: str, cache: Tensor, C: int, R: int) -> None:
    """Refuse a cache whose rows are not those of C and R."""
    if cache.shape[2] != row_bytes(C, R) or C % 4 or R % 2:
        raise ValueError(
            f"{op}: want rows of C + 4 ceil(C / 128) + 2 R bytes, C a multiple of 4 and R of 2, got {cache.shape[2]} "
            f"bytes for C = {C} and R = {R}"
        )
    if cache.dtype != torch.uint8:
        raise TypeError(f"{op}: want a cache of bytes, uint8, got {cache.dtype}")


def _fake(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    return None


def _cost(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> Cost:
    rows = slots.shape[0] * cache.shape[2]
    return Cost(flops=5 * latent.numel(), bytes=tensor_bytes(latent, k_rope, slots) + rows)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    for T, C, R in [(1, 16, 8), (5, 160, 4), (0, 16, 8), (70, 512, 64)]:
        slots = torch.randperm(3 * PAGE_SIZE, device=device)[:T] + PAGE_SIZE
        yield (
            torch.zeros(4, PAGE_SIZE, row_bytes(C, R), device=device, dtype=torch.uint8),
            torch.randn(T, C, device=device, dtype=dtype),
            torch.randn(T, R, device=device, dtype=dtype),
            slots,
        )


append_latent_fp8 = define(
    "append_latent_fp8(Tensor(a!) cache, Tensor latent, Tensor k_rope, Tensor slots) -> ()",
    reference=append_latent_fp8_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    functional=appended_latent_fp8,
    inline_reference=False,
)
"""Append to the cache in FP8.

Args:
    cache: ``[P, 64, W]`` uint8; written in place.
    latent: ``[T, C]``, normed; C is a multiple of 4.
    k_rope: ``[T, R]``, rotated; rounded to bfloat16. R is a multiple of 2.
    slots: ``[T]`` int64, ``page * 64 + offset``; distinct but for those in page 0.

Raises:
    ValueError: shapes do not fit.
    TypeError: ``cache`` is not uint8, or ``slots`` not int64.
"""

append_latent_fp8.provide("torch", _append, priority={"cpu": 5, "cuda": 5})
append_latent_fp8.provide("triton", _launch, priority={"cuda": 10}, supports=_supports)
