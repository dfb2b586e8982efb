"""Token copies sorted by expert, in FP8: ``rows = expert_permute(x, ...); values, scale = quantize(rows)``.

Blocks are 1 x 128. A token is quantized once, whatever the number of its experts.
What it saves: the rows, K times as many bytes as x, are neither written nor read; values are half as large.
Dims: T tokens, K experts per token, M = T * K rows, D width, E experts, B = ceil(D / 128) blocks of a row.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.3 (dispatch in FP8); the order is that of ``expert_permute``.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.sizes import check_value
from deepfuse.ir.tolerance import EXACT
from deepfuse.ops.dequantize import in_memory
from deepfuse.ops.expert_order import find_offsets, find_order, nth_place, token_places
from deepfuse.ops.expert_permute import compare_few, expert_permute_ref, few_rows
from deepfuse.ops.fp8_rounding import amax_bits, quotient_for_fp8, scale_from_amax_bits
from deepfuse.ops.quantize import BITWISE, FP8_DTYPES, check_blocks, empty_scale, quantize_ref, quantized_bytes


def permute_quantize_ref(
    x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, order, inverse, offsets = expert_permute_ref(x, experts, num_experts)
    return (*quantize_ref(rows, dtype, 1, 128, power_of_two), order, inverse, offsets)


def _compare(
    x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same without a sort, as ``expert_permute`` does it with few rows."""
    rows, order, inverse, offsets = compare_few(x, experts, num_experts)
    return (*quantize_ref(rows, dtype, 1, 128, power_of_two), order, inverse, offsets)


def _compare_supports(
    x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool
) -> str | None:
    return few_rows(x, experts, num_experts)


@triton.jit
def _permute_quantize_kernel(
    x_ptr, expert_ptr, order_ptr, inverse_ptr, offsets_ptr, values_ptr, scale_ptr, x_stride, scale_stride_m,
    scale_stride_b, T, D, E, K: tl.constexpr, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_B: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One program per token and some blocks of its row: read once, written to each of its K places."""
    t = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    if t < T:
        b = piece * BLOCK_B + tl.arange(0, BLOCK_B)
        d = b[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(x_ptr + t * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
        place = token_places(expert_ptr, order_ptr, inverse_ptr, t, T, piece == 0, K, COUNT, BLOCK, BLOCK_KEYS)
        scale, stored = scale_from_amax_bits(amax_bits(x, 1), FP8_MAX, POWER_OF_TWO)
        values = quotient_for_fp8(x, scale[:, None], FP8_MAX).to(values_ptr.dtype.element_ty)
        for k in tl.static_range(K):
            row = nth_place(place, k, BLOCK)
            tl.store(values_ptr + row * D + d, values, mask=d < D)
            tl.store(scale_ptr + row * scale_stride_m + b * scale_stride_b, stored, mask=b * 128 < D)
    elif COUNT:
        block = (t - T) * tl.num_programs(1) + piece
        find_offsets(expert_ptr, offsets_ptr, block, T * K, E, BLOCK, BLOCK_KEYS)


def _launch(
    x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, K), D = experts.shape, x.shape[1]
    experts = experts.contiguous()
    # 1024 elements a program, eight a thread, which is 16 bytes of bfloat16; wider rows go to several programs
    blocks = max(min(triton.next_power_of_2(triton.cdiv(D, 128)), 8), 1)
    pieces = triton.cdiv(D, 128 * blocks)
    places, more, constants = find_order(experts, num_experts, pieces)
    values = torch.empty((T * K, D), dtype=dtype, device=x.device)
    scale = empty_scale(values, 1, 128, power_of_two)
    if values.numel() == 0:
        return values, scale, *places
    if x.stride(1) != 1:
        x = x.contiguous()
    _permute_quantize_kernel[(T + more, pieces)](
        x, experts, *places, values, in_memory(scale), x.stride(0), *scale.stride(), T, D, num_experts, K=K,
        FP8_MAX=torch.finfo(dtype).max, POWER_OF_TWO=power_of_two, BLOCK_B=blocks, **constants, num_warps=4,
    )  # fmt: skip
    return values, scale, *places


def _check(x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool) -> None:
    if x.ndim != 2 or experts.ndim != 2:
        raise ValueError(
            f"permute_quantize: want x [T, D] and experts [T, K], got {list(x.shape)} and {list(experts.shape)}"
        )
    check_value(
        x.shape[0] == experts.shape[0],
        lambda: f"permute_quantize: want experts of {x.shape[0]} tokens, got {experts.shape[0]}",
    )
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"permute_quantize: want x in float16, bfloat16, float32 or float64, got {x.dtype}")
    if experts.dtype != torch.int64:
        raise TypeError(f"permute_quantize: want int64 experts, got {experts.dtype}")
    check_blocks("permute_quantize", dtype, 1, 128)


def _fake(
    x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    M = experts.numel()
    values = torch.empty((M, x.shape[1]), dtype=dtype, device=x.device)
    order = experts.new_empty(M)
    offsets = experts.new_empty(num_experts, dtype=torch.int32)
    return values, empty_scale(values, 1, 128, power_of_two), order, order.new_empty(M), offsets


def _cost(x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool) -> Cost:
    rows = experts.shape[1] * quantized_bytes(x.shape, 1, 128, power_of_two)
    # as many operations as quantize has, on tokens
    return Cost(flops=5 * x.numel(), bytes=tensor_bytes(x) + rows + 3 * tensor_bytes(experts) + 4 * num_experts)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int, torch.dtype, bool]]:
    e4m3, e5m2 = FP8_DTYPES
    for T, K, D, E, to, power_of_two in [
        (1, 2, 8, 4, e4m3, False),
        (7, 3, 200, 5, e5m2, True),
        (0, 2, 8, 4, e4m3, False),
        (20, 4, 576, 16, e4m3, True),
    ]:
        experts = torch.stack([torch.randperm(E, device=device)[:K] for _ in range(T)]) if T else torch.empty(0, K)
        yield torch.randn(T, D, device=device, dtype=dtype), experts.to(device, torch.int64), E, to, power_of_two
    # every token to one expert, the others empty
    x = torch.randn(6, 128, device=device, dtype=dtype)
    yield x, torch.full((6, 1), 2, device=device), 4, e4m3, False


permute_quantize = define(
    "permute_quantize(Tensor x, Tensor experts, int num_experts, ScalarType dtype, bool power_of_two)"
    " -> (Tensor values, Tensor scale, Tensor order, Tensor inverse, Tensor offsets)",
    reference=permute_quantize_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance={**BITWISE, torch.float32: EXACT},
)
"""``expert_permute`` and ``quantize`` of its rows in blocks of 1 x 128, bit by bit as the two give them.

Args:
    x: ``[T, D]``; float16, bfloat16 or float32 (float64 by the reference).
    experts: ``[T, K]`` int64, below ``num_experts``; the experts of a token differ.
    num_experts: E.
    dtype, power_of_two: of ``quantize``.

Returns:
    ``values [M, D]`` and ``scale [M, ceil(D / 128)]`` as ``quantize`` gives them and ``fp8_grouped_matmul`` takes them;
    ``order``, ``inverse`` and ``offsets`` as in ``expert_permute``.

Raises:
    ValueError: shapes do not fit.
    TypeError: ``x`` is not floating point of 16 bits or more, ``experts`` is not int64, or ``dtype`` is no FP8 format.
"""

permute_quantize.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
permute_quantize.provide("compare", _compare, priority={"cpu": 10}, supports=_compare_supports, inline=True)
