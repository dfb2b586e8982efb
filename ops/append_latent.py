"""Write the latents of new tokens into the paged latent cache. The one op that mutates.

    cache[slot // PAGE, slot % PAGE] = [latent | k_rope]     for each token

Page 0 belongs to nobody: padding rows and calls that keep no cache write there.
Dims: T tokens, P pages, C latent rank, R rotary width.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2: only ``c_t`` and the rotated ``k_t`` are kept.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define

PAGE_SIZE = 64
"""Tokens in a page: the page of FlashMLA, so that caches can be shared with it."""


def append_latent_ref(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    cache.copy_(appended_latent(cache, latent, k_rope, slots))


def appended_latent(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> Tensor:
    """The cache after the write, as a new tensor: what the op means in a functional graph."""
    rows_TD = torch.cat((latent, k_rope), dim=-1).to(cache.dtype)
    return cache.index_put((slots // PAGE_SIZE, slots % PAGE_SIZE), rows_TD)


@triton.jit
def _append_latent_kernel(
    cache_ptr, latent_ptr, k_rope_ptr, slots_ptr, page_stride, row_stride, latent_stride, k_rope_stride,
    C, R, PAGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    row_ptr = cache_ptr + (slot // PAGE) * page_stride + (slot % PAGE) * row_stride
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    latent = tl.load(latent_ptr + t * latent_stride + c, mask=c < C, other=0.0)
    k_rope = tl.load(k_rope_ptr + t * k_rope_stride + r, mask=r < R, other=0.0)
    tl.store(row_ptr + c, latent.to(cache_ptr.dtype.element_ty), mask=c < C)
    tl.store(row_ptr + C + r, k_rope.to(cache_ptr.dtype.element_ty), mask=r < R)


def _launch(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    if slots.numel() == 0:
        return
    # both are often parts of the rows of one projection, so rows may be strided
    latent, k_rope = (t if t.stride(1) == 1 else t.contiguous() for t in (latent, k_rope))
    C, R = latent.shape[1], k_rope.shape[1]
    _append_latent_kernel[(slots.shape[0],)](
        cache, latent, k_rope, slots.contiguous(), cache.stride(0), cache.stride(1), latent.stride(0),
        k_rope.stride(0), C, R, PAGE=PAGE_SIZE, BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(R),
        num_warps=1 if C <= 256 else 2,  # eight elements a thread at C = 512
    )  # fmt: skip


def _rows_contiguous(cache: Tensor, *rest: Tensor) -> str | None:
    return None if cache.stride(2) == 1 else f"wants a cache with contiguous rows, not strides {list(cache.stride())}"


def _append(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    page_T, offset_T = slots // PAGE_SIZE, slots % PAGE_SIZE
    cache.index_put_((page_T, offset_T), torch.cat((latent, k_rope), dim=-1).to(cache.dtype))


def _check(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    if (
        cache.ndim != 3
        or cache.shape[1] != PAGE_SIZE
        or latent.ndim != 2
        or k_rope.ndim != 2
        or latent.shape[1] + k_rope.shape[1] != cache.shape[2]
        or slots.ndim != 1
    ):
        raise ValueError(
            f"append_latent: want cache [P, {PAGE_SIZE}, C + R], latent [T, C], k_rope [T, R] and slots [T], got "
            f"{list(cache.shape)}, {list(latent.shape)}, {list(k_rope.shape)} and {list(slots.shape)}"
        )
    if slots.dtype != torch.int64:
        raise TypeError(f"append_latent: want int64 slots, got {slots.dtype}")


def _fake(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    return None


def _cost(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> Cost:
    rows = tensor_bytes(latent, k_rope)
    return Cost(flops=0, bytes=2 * rows + tensor_bytes(slots))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    for T, C, R in [(1, 16, 8), (5, 24, 4), (0, 16, 8), (70, 512, 64)]:
        cache = torch.zeros(4, PAGE_SIZE, C + R, device=device, dtype=dtype)
        slots = torch.randperm(3 * PAGE_SIZE, device=device)[:T] + PAGE_SIZE
        yield (
            cache,
            torch.randn(T, C, device=device, dtype=dtype),
            torch.randn(T, R, device=device, dtype=dtype),
            slots,
        )


append_latent = define(
    "append_latent(Tensor(a!) cache, Tensor latent, Tensor k_rope, Tensor slots) -> ()",
    reference=append_latent_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    functional=appended_latent,
    inline_reference=False,
)
"""Append to the cache.

Args:
    cache: ``[P, 64, C + R]``; written in place.
    latent: ``[T, C]``, normed.
    k_rope: ``[T, R]``, rotated.
    slots: ``[T]`` int64, ``page * 64 + offset``; distinct but for those in page 0.

Raises:
    ValueError: shapes do not fit.
    TypeError: ``slots`` is not int64.
"""

append_latent.provide("torch", _append, priority={"cpu": 5, "cuda": 5})
append_latent.provide("triton", _launch, priority={"cuda": 10}, supports=_rows_contiguous)
