"""Cases of latent attention: decode steps over a paged cache, and prompts, at DeepSeek-V3's widths.

Dims: B sequences, P pages of one, H heads, C latent, R rotary, N and V width of a head's key and value.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, Work, providers
from torch import Tensor
from torch.nn import functional

from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import packed_rows
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8
from deepfuse.ops.mla_decode_project import mla_decode_project
from deepfuse.ops.quantize import quantize


@dataclass(frozen=True, slots=True)
class Widths:
    """Of an attention layer; DeepSeek-V3's."""

    H: int = 128
    C: int = 512
    R: int = 64
    N: int = 128
    V: int = 128

    @property
    def scale(self) -> float:
        return (self.N + self.R) ** -0.5


DECODE = ((1, 1024), (64, 1024), (128, 4096), (8, 32768), (1, 32768))
"""Sequences, and tokens in the cache of each."""
PROMPTS = ((1, 2048), (16, 512), (1, 8192))
"""Sequences, and tokens of each."""


def decode(
    device: torch.device, steps: Iterable[tuple[int, int]] = DECODE, widths: Widths = Widths()
) -> Iterator[Case]:
    """Absorbed attention of a step, over a cache in bfloat16 and in FP8; and with the projection behind it."""
    for B, context in steps:
        for fp8 in (False, True):
            name = "mla_decode_fp8" if fp8 else "mla_decode"
            arguments = device, B, context, fp8, widths
            yield Case(f"{name} {B} x {context}", lambda a=arguments: _decode(*a))  # type: ignore[misc]
        yield Case(
            f"mla_decode_project {B} x {context}",
            lambda B=B, context=context: _project(device, B, context, widths),  # type: ignore[misc]
        )


def prompts(
    device: torch.device, batches: Iterable[tuple[int, int]] = PROMPTS, widths: Widths = Widths()
) -> Iterator[Case]:
    """Causal attention of whole prompts, beside PyTorch's fused attention of the same keys and values."""
    for B, tokens in batches:
        yield Case(f"mla_attention {B} x {tokens}", lambda B=B, tokens=tokens: _prompts(device, B, tokens, widths))  # type: ignore[misc]


def step_arguments(device: torch.device, B: int, context: int, fp8: bool, w: Widths) -> tuple[Any, ...]:
    """Of ``mla_decode`` or ``mla_decode_fp8``: pages that lie anywhere, all of them full."""
    P = context // PAGE_SIZE
    rows = (B * P + 1) * PAGE_SIZE
    latent, k_rope = _random(device, rows, w.C), _random(device, rows, w.R)
    cache = packed_rows(latent, k_rope) if fp8 else torch.cat((latent, k_rope), -1)
    table = torch.randperm(B * P, device=device).reshape(B, P) + 1
    seqlens = torch.full((B,), P * PAGE_SIZE, dtype=torch.int32, device=device)
    queries = _random(device, B, w.H, w.C), _random(device, B, w.H, w.R)
    return *queries, cache.unflatten(0, (-1, PAGE_SIZE)), table, seqlens, w.scale


def _decode(device: torch.device, B: int, context: int, fp8: bool, w: Widths) -> Work:
    op, args = mla_decode_fp8 if fp8 else mla_decode, step_arguments(device, B, context, fp8, w)
    alternatives: dict[str, Callable[[], Any]] = providers(op, args, device)
    if not fp8:
        alternatives["torch, contiguous cache"] = _torch_decode(*args, C=w.C)
    return Work(alternatives=alternatives, cost=op.cost(*args), dtype=torch.bfloat16, facts={"B": B, "tokens": context})


def _torch_decode(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, scale: float, *, C: int
) -> Callable[[], Tensor]:
    """Two products and a softmax over rows that lie together: what a page table is spared is not in the time."""
    rows_BSD = cache[table].flatten(1, 2)
    q_BHD = torch.cat((q_latent, q_rope), -1)
    return lambda: torch.softmax(torch.bmm(q_BHD, rows_BSD.mT) * scale, -1) @ rows_BSD[..., :C]


def _project(device: torch.device, B: int, context: int, w: Widths) -> Work:
    step = step_arguments(device, B, context, False, w)
    weight = _random(device, w.H * (w.N + w.V), w.C) / w.C**0.5
    e4m3 = torch.float8_e4m3fn
    args = (*step, weight, None, w.V, e4m3, False, False)
    values_HCV = weight.view(w.H, w.N + w.V, w.C)[:, w.N :].mT

    def apart() -> Any:
        y = head_matmul(mla_decode(*step), values_HCV)
        return quantize(y.flatten(1), e4m3, 1, 128, False)

    return Work(
        alternatives={**providers(mla_decode_project, args, device), "three ops": apart},
        cost=mla_decode_project.cost(*args),
        dtype=torch.bfloat16,
        facts={"B": B, "tokens": context},
    )


def _prompts(device: torch.device, B: int, tokens: int, w: Widths) -> Work:
    T = B * tokens
    q, kv, k_rope = (
        _random(device, T, w.H, w.N + w.R),
        _random(device, T, w.H, w.N + w.V),
        _random(device, T, w.R),
    )
    starts = torch.arange(0, T + 1, tokens, dtype=torch.int32, device=device)
    lengths = torch.full((B,), tokens, dtype=torch.int32, device=device)
    args = (q, kv, k_rope, starts, starts[:-1].contiguous(), lengths, w.scale)
    # the same keys and values, each expanded, sequence by sequence and head by head
    k = torch.cat((kv[..., : w.N], k_rope[:, None].expand(T, w.H, w.R)), -1)
    q_BHTD, k_BHTD, v_BHTV = (x.unflatten(0, (B, tokens)).transpose(1, 2) for x in (q, k, kv[..., w.N :]))
    return Work(
        alternatives={
            **providers(mla_attention, args, device),
            "scaled_dot_product_attention": lambda: functional.scaled_dot_product_attention(
                q_BHTD, k_BHTD, v_BHTV, is_causal=True, scale=w.scale
            ),
        },
        cost=mla_attention.cost(*args),
        dtype=torch.bfloat16,
        facts={"B": B, "tokens": tokens},
    )


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)
