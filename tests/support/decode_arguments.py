"""Arguments of a step of absorbed attention, over caches that hold nothing but NaN where no token lies."""

from typing import Any

import torch

from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import append_latent_fp8, row_bytes


def decode_arguments(
    seqlens: list[int], P: int, H: int, C: int, R: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Arguments whose cache is NaN wherever no token of a sequence lies, page 0 included."""
    B = len(seqlens)
    table = torch.randperm(B * P).reshape(B, P) + 1
    cache = torch.full((B * P + 1, PAGE_SIZE, C + R), float("nan"), dtype=dtype)
    for pages, length in zip(table, seqlens, strict=True):
        for page, first in zip(pages, range(0, length, PAGE_SIZE), strict=False):
            size = min(length - first, PAGE_SIZE)
            cache[page, :size] = torch.randn(size, C + R, dtype=dtype)
    return *_queries(B, H, C, R, dtype), cache, table, torch.tensor(seqlens, dtype=torch.int32), (C + R) ** -0.5


def decode_arguments_fp8(
    seqlens: list[int], P: int, H: int, C: int, R: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Arguments whose cache has all bits set, which is NaN in each format, wherever no token lies, page 0 included."""
    B = len(seqlens)
    table = torch.randperm(B * P).reshape(B, P) + 1
    cache = torch.full((B * P + 1, PAGE_SIZE, row_bytes(C, R)), 255, dtype=torch.uint8)
    for pages, length in zip(table, seqlens, strict=True):
        slots = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:length]
        append_latent_fp8(cache, torch.randn(length, C), torch.randn(length, R), slots)
    return *_queries(B, H, C, R, dtype), cache, table, torch.tensor(seqlens, dtype=torch.int32), (C + R) ** -0.5


def _queries(B: int, H: int, C: int, R: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, H, C]`` and ``[B, H, R]``."""
    return torch.randn(B, H, C, dtype=dtype), torch.randn(B, H, R, dtype=dtype)
