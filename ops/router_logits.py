"""The router's logits in float32, from numbers as narrow as they are stored: ``x.float() @ weight.float().T``.

Products of bfloat16 or float16 numbers are exact in float32, and so is whatever adds them there: nothing is gained by
widening the operands in memory first.
Dims: T tokens, D model width, E experts.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 15, ``u_t . e_i``; section 3.3.1 keeps the router in high precision.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most, float32_at_most
from deepfuse.ops.linear import linear_ref, matvec, matvec_supports

FEW_TOKENS = 16
"""Up to so many tokens a product is bound by reading the weight, and has too few tiles for a GPU's processors: experts are
shared out, and each program sums over the whole width. TensorRT-LLM's ``dsv3RouterGemm`` goes as far."""


def router_logits_ref(x: Tensor, weight: Tensor) -> Tensor:
    return linear_ref(*_wide(x, weight), None)


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    compute = _result_dtype(x, weight)
    return x.to(compute), weight.to(compute)


def _result_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _matvec(x: Tensor, weight: Tensor) -> Tensor:
    return matvec(*_wide(x, weight), None)


def _matvec_supports(x: Tensor, weight: Tensor) -> str | None:
    return matvec_supports(x, weight, None)


@triton.jit
def _router_logits_kernel(
    x_ptr, weight_ptr, logits_ptr, x_stride, weight_stride, T, E, D, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for some experts, over all tokens and the whole width; a thread adds up its share of the columns."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_T, BLOCK_E, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        is_column = (start + d < D)[None, :]
        x = tl.load(x_ptr + t[:, None] * x_stride + (start + d)[None, :], mask=(t < T)[:, None] & is_column, other=0.0)
        weight_tile = weight_ptr + e[:, None] * weight_stride + (start + d)[None, :]
        weight = tl.load(weight_tile, mask=(e < E)[:, None] & is_column, other=0.0)
        sums += x.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    logits = tl.sum(sums, 2)
    tl.store(logits_ptr + t[:, None] * E + e[None, :], logits, mask=(t < T)[:, None] & (e < E)[None, :])


def _launch(x: Tensor, weight: Tensor) -> Tensor:
    (T, D), E = x.shape, weight.shape[0]
    logits = torch.empty((T, E), dtype=torch.float32, device=x.device)
    if logits.numel() == 0:
        return logits
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    block_t = triton.next_power_of_2(T)
    # two experts a program give DeepSeek-V3's 256 to 128 processors. Each program reads all of x, from the level-2 cache:
    # more tokens meet more experts there, so that x is read less often; four with 16 tokens are four times the weight
    block_e = 2 if block_t <= 4 else 4
    # at most 64 sums a thread, or 128 with 16 tokens
    block_d = min(max(triton.next_power_of_2(D), 16), 1024 if block_t * block_e <= 8 else 256)
    _router_logits_kernel[(triton.cdiv(E, block_e),)](
        x, weight, logits, x.stride(0), weight.stride(0), T, E, D, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_D=block_d,
        # a processor has one program: seven tiles on their way are a program's share of DeepSeek-V3's weight
        STAGES=8, num_warps=4,
    )  # fmt: skip
    return logits


def _launch_supports(x: Tensor, weight: Tensor) -> str | None:
    if not at_most(x.shape[0], FEW_TOKENS):
        return f"tokens are not known to be at most {FEW_TOKENS}"
    return float32_at_most(x) or float32_at_most(weight)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _torch_supports(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype != weight.dtype or x.element_size() > 2:
        return f"cuBLAS widens the result of two operands in bfloat16 or float16, got {x.dtype} and {weight.dtype}"
    return None


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"router_logits: want x [T, D] and weight [E, D], got {list(x.shape)} and {list(weight.shape)}"
        )
    for name, t in (("x", x), ("weight", weight)):
        if not t.is_floating_point() or t.element_size() < 2:
            raise TypeError(f"router_logits: want {name} in float16, bfloat16, float32 or float64, got {t.dtype}")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[0]), dtype=_result_dtype(x, weight), device=x.device)


def _cost(x: Tensor, weight: Tensor) -> Cost:
    logits = x.shape[0] * weight.shape[0]
    return Cost(
        flops=2 * logits * x.shape[1], bytes=tensor_bytes(x, weight) + logits * _result_dtype(x, weight).itemsize
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    # one token; several, with experts and a width that are no multiple of anything; none; more than few
    for T, E, D in [(1, 8, 16), (7, 33, 300), (12, 5, 100), (0, 8, 16), (17, 16, 64)]:
        weight = torch.randn(E, D, device=device, dtype=dtype) / D**0.5
        x = torch.randn(T, D, device=device, dtype=dtype)
        yield x, weight
    # a router kept in float32 beside a narrow model
    yield torch.randn(3, 40, device=device, dtype=dtype), torch.randn(6, 40, device=device).to(weight.dtype) / 40**0.5


router_logits = define(
    "router_logits(Tensor x, Tensor weight) -> Tensor",
    reference=router_logits_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""Affinity of each token to each expert, before the scoring function.

Without a gradient: that of a training step wants both operands in float32, and ``fuse_router_logits`` leaves it alone.

Args:
    x: ``[T, D]``.
    weight: ``[E, D]``; may have another dtype than ``x``.

Returns:
    ``[T, E]``, float32 (float64 if one of the two is).

Raises:
    ValueError: shapes do not fit.
    TypeError: ``x`` or ``weight`` is not floating point of 16 bits or more.
"""

router_logits.provide("triton", _launch, priority={"cuda": 20}, supports=_launch_supports)
# the tensor cores, summing in float32
router_logits.provide("torch", _torch, priority={"cuda": 10}, supports=_torch_supports)
router_logits.provide("matvec", _matvec, priority={"cpu": 10}, supports=_matvec_supports, inline=True)
