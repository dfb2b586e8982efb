"""Arguments of DeepSeek-V3's widths, or others, for each op: what its kernels are compiled for, and what is measured.

Nothing is computed with them: all are ``meta`` tensors.

Dims: T tokens, D model, H heads, C latent, Q query latent, R rotary, N head (nope and value), E experts, K experts a
token, F width of an expert, V vocabulary, P pages a sequence, M rows of all experts.
"""

from dataclasses import dataclass
from typing import Any

import torch

TOKENS = (1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1024, 2048, 3001, 4096)
"""Of decode steps and prompts. Launch code asks whether sizes are 1, multiples of 16 or below powers of two, and for the
next power of two; Triton, whether they are 1 or multiples of 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Of a model, by the letters above; DeepSeek-V3's. Experts are chosen from 8 groups, 4 of which count."""

    D: int = 7168
    H: int = 128
    C: int = 512
    Q: int = 1536
    R: int = 64
    N: int = 128
    E: int = 256
    K: int = 8
    F: int = 2048
    V: int = 129280
    P: int = 64


def deepseek_v3_arguments() -> dict[str, list[tuple[int, tuple[Any, ...]]]]:
    """Name of an op -> numbers of tokens, in ascending order, and arguments."""
    found: dict[str, list[tuple[int, tuple[Any, ...]]]] = {}
    for T in TOKENS:
        for name, argument_tuples in arguments_of(T).items():
            found.setdefault(name, []).extend((T, args) for args in argument_tuples)
        if T <= 64:
            for name, args in _one_more_expert(T).items():
                found[name].append((T, args))
    return found


def _one_more_expert(T: int) -> dict[str, tuple[Any, ...]]:
    """Of a decode step whose shared expert is one of the routed ones: 257 experts, nine a token.

    Of what moves rows, only ``expert_unpermute``: the others are there for any number of tokens.
    """
    D, E, K, F, fp8 = 7168, 257, 9, 2048, torch.float8_e4m3fn
    M = T * K

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    offsets, inverse = t(E, dtype=torch.int32), t(M, dtype=torch.int64)
    scales = t(D // 128, M, dtype=torch.float32).t()
    up_fp8 = t(E, 2 * F, D, dtype=fp8), t(E, 2 * F // 128, D // 128, dtype=torch.float32)
    return {
        "route": (t(T, 256, dtype=torch.float32), None, "sigmoid", "top2_sum", 8, 4, 8, True, 2.5, 1),
        "grouped_matmul": (t(M, D), t(E, 2 * F, D), offsets),
        "fp8_grouped_matmul": (t(M, D, dtype=fp8), scales, *up_fp8, offsets, torch.bfloat16),
        "expert_unpermute": (t(M, D), inverse, inverse, t(T, K, dtype=torch.float32)),
    }


def arguments_of(T: int, widths: Widths = Widths()) -> dict[str, list[tuple[Any, ...]]]:
    """Name of an op -> arguments of so many tokens."""
    w = widths
    D, H, C, Q, R, N, E, K, F, V, P = w.D, w.H, w.C, w.Q, w.R, w.N, w.E, w.K, w.F, w.V, w.P
    M, scale, eps, fp8 = T * K, (N + R) ** -0.5, 1e-6, torch.float8_e4m3fn
    blocks = (M + 127) // 128

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def f(*shape: int) -> torch.Tensor:
        return t(*shape, dtype=torch.float32)

    def i(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return t(*shape, dtype=dtype)

    def attention(heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
        return t(T, heads, N + R, dtype=dtype), t(T, heads, 2 * N, dtype=dtype), t(T, R, dtype=dtype)

    starts = (i(2, dtype=torch.int32), i(1, dtype=torch.int32), i(1, dtype=torch.int32))
    cache, table = t(T * P + 1, 64, C + R), i(T, P)
    cache_fp8 = t(T * P + 1, 64, C + 4 * C // 128 + 2 * R, dtype=torch.uint8)
    experts_up, experts_down, offsets = t(E, 2 * F, D), t(E, D, F), i(E, dtype=torch.int32)
    fp8_up = t(E, 2 * F, D, dtype=fp8), f(E, 2 * F // 128, D // 128)
    per_row = (f(T), i(T), f(T), i(T), i(T))
    # kv_b_proj, [H (N + V), C], in bfloat16 and in FP8
    kv_b_weights = (t(2 * H * N, C), None), (t(2 * H * N, C, dtype=fp8), f(2 * H * N // 128, C // 128))
    router = ("sigmoid", "top2_sum", 8, 4, K, True, 2.5)
    return {
        "absorb_query": [
            (t(T, H, N + R)[..., :N], t(T, H, N + R)[..., N:], f(T, R // 2), f(T, R // 2), True, *kv_b)
            for kv_b in kv_b_weights
        ],
        "rms_norm": [(t(T, width), t(width), eps) for width in (D, Q, C)],
        "add_rms_norm": [(t(T, D), t(T, D), t(D), eps)],
        "add_rms_norm_quantize": [(t(T, D), t(T, D), t(D), eps, fp8, False, keep) for keep in (False, True)],
        "append_latent": [(cache, t(T, C), t(T, R), i(T))],
        "append_latent_fp8": [(cache_fp8, t(T, C), t(T, R), i(T))],
        "fp8_grouped_matmul": [
            # of a prompt, and of sixteen together
            *(
                (t(rows, D, dtype=fp8), f(D // 128, rows).t(), *fp8_up, offsets, torch.bfloat16)
                for rows in ((M, 16 * M) if T == 4096 else (M,))
            ),
            # the gradient of the input
            (t(M, 2 * F, dtype=fp8), f(2 * F // 128, M).t(), *(u.mT for u in fp8_up), offsets, torch.bfloat16),
        ],
        "fp8_grouped_matmul_masked": [
            (
                t(E, room, D, dtype=fp8),
                f(E, D // 128, room).mT,
                *fp8_up,
                offsets,
                torch.bfloat16,
            )
            for room in (16, 64, 128)
        ],
        "fp8_grouped_matmul_wgrad": [
            (t(M, n, dtype=fp8), f(blocks, n), t(M, k, dtype=fp8), f(blocks, k), offsets, torch.float32)
            for n, k in ((2 * F, D), (D, F))
        ],
        "gather_latent": [(cache, table)],
        "gather_latent_fp8": [(cache_fp8, table, C, torch.bfloat16)],
        "dequantize": [
            (t(T, D, dtype=fp8), f(T, D // 128), 1, 128, torch.bfloat16),
            (t(T, D, dtype=fp8), f((T + 127) // 128, D), 128, 1, torch.bfloat16),
            (t(C + R, D, dtype=fp8), f((C + R + 127) // 128, D // 128), 128, 128, torch.bfloat16),
            (*fp8_up, 128, 128, torch.bfloat16),
        ],
        "fp8_matmul": [
            (
                t(T, k, dtype=fp8),
                f((k + 127) // 128, (T + 3) // 4 * 4).t()[:T],
                t(n, k, dtype=fp8),
                f((n + 127) // 128, (k + 127) // 128),
                128,
                None,
                None,
                torch.bfloat16,
            )
            # every projection of attention, and of the experts
            for n, k in ((Q + C + R, D), (H * (N + R), Q), (H * 2 * N, C), (D, H * N), (2 * F, D), (D, F), (C + R, D))
        ]
        + [
            # the gradients of the input and of the weight
            gradient
            for n, k in ((C + R, D), (2 * F, D))
            for gradient in (
                (
                    t(T, n, dtype=fp8),
                    f((n + 127) // 128, (T + 3) // 4 * 4).t()[:T],
                    t(n, k, dtype=fp8).t(),
                    f((n + 127) // 128, (k + 127) // 128).t(),
                    128,
                    None,
                    None,
                    torch.bfloat16,
                ),
                (
                    t(T, n, dtype=fp8).t(),
                    f((T + 127) // 128, n).t(),
                    t(T, k, dtype=fp8).t(),
                    f((T + 127) // 128, k).t(),
                    1,
                    None,
                    None,
                    torch.float32,
                ),
            )
        ],
        # K and E with a shared expert as one more, too
        "expert_permute": [(t(T, D), i(T, K), E), (t(T, D), i(T, K + 1), E + 1)],
        "expert_unpermute": [(t(M, D), i(M), i(M), f(T, K))],
        "grouped_matmul": [
            (t(M, D), experts_up, offsets),
            (t(M, F), experts_down, offsets),
            # the gradients with respect to the rows
            (t(M, 2 * F), experts_up.mT, offsets),
            (t(M, D), experts_down.mT, offsets),
        ],
        "grouped_matmul_wgrad": [(t(M, 2 * F), t(M, D), offsets), (t(M, D), t(M, F), offsets)],
        # the two sides of kv_b_proj, [H, N + V, C]
        "head_matmul": [
            (t(T, H, N + R)[..., :N], t(H, 2 * N, C)[:, :N]),
            (t(T, H, C), t(H, 2 * N, C)[:, N:].mT),
        ],
        "mla_attention": [(*attention(H), *starts, scale)],
        "mla_attention_backward": [
            (
                t(T, heads, N, dtype=dtype),
                *attention(heads, dtype),
                t(T, heads, N, dtype=dtype),
                f(T, heads),
                *starts,
                scale,
            )
            # numbers of heads and tokens that are no multiple of anything; the wide registers of float32
            for heads, dtype in ((H, torch.bfloat16), (3, torch.bfloat16), (H, torch.float32))
        ],
        "mla_decode": [(t(T, H, C), t(T, H, R), cache, table, i(T, dtype=torch.int32), scale)],
        "mla_decode_fp8": [(t(T, H, C), t(T, H, R), cache_fp8, table, i(T, dtype=torch.int32), scale)],
        # a weight in bfloat16 and in FP8, quantized or not; few and many splits, heads and sequences
        "mla_decode_project": [
            (t(B, H, C), t(B, H, R), to, i(B, pages), i(B, dtype=torch.int32), scale, *kv_b, N, quantized, False, False)
            for B, pages in ((T, P), (min(T, 8), 16 * P))
            for to in (cache, cache_fp8)
            for kv_b, quantized in ((kv_b_weights[0], None), (kv_b_weights[1], None), (kv_b_weights[1], fp8))
        ],
        "norm_rope_append": [
            (to, t(T, C + R)[:, :C], t(T, C + R)[:, C:], t(C), f(T, R // 2), f(T, R // 2), i(T), eps, True, keep)
            for to in (cache, cache_fp8)
            for keep in (False, True)
        ],
        "permute_quantize": [
            (t(T, D), i(T, K), E, fp8, False),
            (t(T, D), i(T, K + 1), E + 1, fp8, False),
        ],
        "quantize": [
            *((t(T, width), fp8, 1, 128, pow2) for width in (D, Q) for pow2 in (False, True)),
            (t(T, D), fp8, 128, 1, False),
            (t(C + R, D), fp8, 128, 128, False),
            (f(C + R, D), fp8, 128, 128, False),
            (experts_up, fp8, 128, 128, False),
            (t(T, D), fp8, 0, 0, False),
        ],
        "quantize_static": [
            (t(T, D), f(1, 1), fp8, 0, 0),
            (t(T, D), f((T + 127) // 128, D), fp8, 128, 1),
            (t(C + R, D), f((C + R + 127) // 128, D // 128), fp8, 128, 128),
        ],
        "rms_norm_quantize": [(t(T, width), t(width), eps, fp8, False, False) for width in (D, Q)],
        "router_logits": [(t(T, D), t(E, D)), (t(T, D), f(E, D)), (f(T, D), f(E, D))],
        "rotary": [(t(T, heads, R), f(T, R // 2), f(T, R // 2), True) for heads in (H, 1)],
        "route": [(f(T, E), f(E), *router, 0)],
        "sample": [(f(T, V), *per_row), (t(T, V), *per_row)],
        "swiglu": [tuple(t(T, 2 * width).chunk(2, -1)) for width in (9 * F, F)],
        "swiglu_quantize": [(*t(T, 2 * width).chunk(2, -1), fp8, False, False) for width in (9 * F, F)],
    }
