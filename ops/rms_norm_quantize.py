"""RMSNorm and the FP8 values of its result: ``y = rms_norm(x); values, scale = quantize(y)``, in blocks of 1 x 128.

What it saves: y is not read again; and not written, where nobody else wants it.
Dims: M rows, D width, B = ceil(D / 128) blocks of a row.
Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4; DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.tolerance import ONE_FLOAT8_STEP
from deepfuse.ops.dequantize import in_memory
from deepfuse.ops.fp8_rounding import amax_bits, quotient_for_fp8, scale_from_amax_bits
from deepfuse.ops.quantize import FP8_DTYPES, check_blocks, empty_scale, quantize_ref, quantized_bytes
from deepfuse.ops.rms_norm import normed_row, rms_norm_ref, row_tile


def rms_norm_quantize_ref(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y_MD = rms_norm_ref(x, weight, eps)
    return (y_MD if keep else y_MD.new_empty(0), *quantize_ref(y_MD, dtype, 1, 128, power_of_two))


@triton.jit
def quantized_row(y, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Of ``BLOCK_D`` numbers, zero past the row's end: their values, float32, and ``BLOCK_B`` scales as they are stored."""
    blocks = tl.reshape(y, (BLOCK_B, BLOCK_D // BLOCK_B))
    scale, stored = scale_from_amax_bits(amax_bits(blocks, 1), FP8_MAX, POWER_OF_TWO)
    return tl.reshape(quotient_for_fp8(blocks, scale[:, None], FP8_MAX), (BLOCK_D,)), stored


@triton.jit
def store_normed_and_quantized(
    x, weight_ptr, y_ptr, values_ptr, scale_ptr, scale_stride_m, scale_stride_b, m, D, eps, FP8_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, KEEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of row ``m``, given in float32 and zero past its end: its norm, if it is kept, and that norm's values and scales."""
    d, b = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_B)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    # what is quantized is the rounded result, which others may read too
    y = normed_row(x, weight, D, eps).to(y_ptr.dtype.element_ty)
    if KEEP:
        tl.store(y_ptr + m * D + d, y, mask=mask)
    # NaN times zero is not zero
    y = tl.where(mask, y.to(tl.float32), 0.0)
    values, scale = quantized_row(y, BLOCK_D, BLOCK_B, FP8_MAX, POWER_OF_TWO)
    # written this way, as many numbers lie side by side as a thread has read: else Triton reads and sums them in the
    # order in which a thread would best write bytes, and the sum is another than that of rms_norm
    side_by_side = d // VECTOR * VECTOR + d % VECTOR
    tl.store(values_ptr + m * D + side_by_side, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + m * scale_stride_m + b * scale_stride_b, scale, mask=b * 128 < D)


@triton.jit
def _rms_norm_quantize_kernel(
    x_ptr, weight_ptr, y_ptr, values_ptr, scale_ptr, x_stride, scale_stride_m, scale_stride_b, D, eps,
    FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, KEEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per row, which is held in registers."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + m * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    store_normed_and_quantized(
        x, weight_ptr, y_ptr, values_ptr, scale_ptr, scale_stride_m, scale_stride_b, m, D, eps, FP8_MAX, POWER_OF_TWO,
        KEEP, BLOCK_D, BLOCK_B, VECTOR,
    )  # fmt: skip


def _launch(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = y, values, scale = _fake(x, weight, eps, dtype, power_of_two, keep)
    if values.numel() == 0:
        return outputs
    if x.stride(1) != 1:
        x = x.contiguous()
    M, D = x.shape
    block_d, num_warps = row_tile(D)
    _rms_norm_quantize_kernel[(M,)](
        x, weight.contiguous(), y, values, in_memory(scale), x.stride(0), *scale.stride(), D, eps,
        FP8_MAX=torch.finfo(dtype).max, POWER_OF_TWO=power_of_two, KEEP=keep, BLOCK_D=block_d,
        BLOCK_B=max(block_d // 128, 1), VECTOR=16 // x.element_size(), num_warps=num_warps,
    )  # fmt: skip
    return outputs


def _check(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool) -> None:
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"rms_norm_quantize: want x [M, D] and weight [D], got {list(x.shape)} and {list(weight.shape)}"
        )
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"rms_norm_quantize: want x in float16, bfloat16, float32 or float64, got {x.dtype}")
    check_blocks("rms_norm_quantize", dtype, 1, 128)


def _fake(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M, D = x.shape
    y = torch.empty((M, D) if keep else (0,), dtype=x.dtype, device=x.device)
    values = torch.empty((M, D), dtype=dtype, device=x.device)
    return y, values, empty_scale(values, 1, 128, power_of_two)


def _cost(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool) -> Cost:
    read_and_kept = tensor_bytes(x) * (2 if keep else 1) + tensor_bytes(weight)
    # as many operations as the two ops
    return Cost(flops=9 * x.numel(), bytes=read_and_kept + quantized_bytes(x.shape, 1, 128, power_of_two))


def _samples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, float, torch.dtype, bool, bool]]:
    e4m3, e5m2 = FP8_DTYPES
    # one row; not a power of two; no rows; more than a block, not full; whole blocks; the width of DeepSeek-V3
    for shape, to, power_of_two, keep in [
        ((1, 8), e4m3, False, True),
        ((3, 100), e5m2, True, False),
        ((0, 16), e4m3, False, True),
        ((5, 576), e4m3, False, False),
        ((6, 256), e4m3, True, True),
        ((2, 7168), e4m3, False, True),
    ]:
        x, weight = (torch.randn(size, device=device, dtype=dtype) for size in (shape, shape[1:]))
        yield x, weight, 1e-6, to, power_of_two, keep


rms_norm_quantize = define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, ScalarType dtype, bool power_of_two, bool keep)"
    " -> (Tensor y, Tensor values, Tensor scale)",
    reference=rms_norm_quantize_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=ONE_FLOAT8_STEP,
)
"""``rms_norm`` and ``quantize`` of its result in blocks of 1 x 128, bit by bit as the two give them.

Args:
    x: ``[M, D]``; float16, bfloat16 or float32 (float64 by the reference); rows may be strided.
    weight: ``[D]``, any floating dtype.
    eps: added to the mean square, in units of x**2.
    dtype, power_of_two: of ``quantize``.
    keep: whether somebody else wants y too, such as the backward pass.

Returns:
    ``y [M, D]``, contiguous, dtype of ``x`` (``[0]`` without ``keep``); ``values [M, D]`` and
    ``scale [M, ceil(D / 128)]`` as ``quantize`` gives them.

Raises:
    ValueError: ``x`` is no matrix, or ``weight`` is not ``[D]``.
    TypeError: ``x`` is not floating point of 16 bits or more, or ``dtype`` is no FP8 format.
"""

rms_norm_quantize.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
