"""Residual add, RMSNorm and FP8 values: ``h = x + residual; y = rms_norm(h); values, scale = quantize(y)``.

Blocks are 1 x 128.
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
from deepfuse.ops.add_rms_norm import add_rms_norm_ref
from deepfuse.ops.dequantize import in_memory
from deepfuse.ops.quantize import FP8_DTYPES, check_blocks, empty_scale, quantize_ref, quantized_bytes
from deepfuse.ops.rms_norm import row_tile
from deepfuse.ops.rms_norm_quantize import store_normed_and_quantized


def add_rms_norm_quantize_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y_MD, h_MD = add_rms_norm_ref(x, residual, weight, eps)
    return (y_MD if keep else y_MD.new_empty(0), h_MD, *quantize_ref(y_MD, dtype, 1, 128, power_of_two))


@triton.jit
def _add_rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, values_ptr, scale_ptr, x_stride, residual_stride,
    scale_stride_m, scale_stride_b, D, eps, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per row, which is held in registers."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + m * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + m * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    # the norm takes the rounded sum, which others read too
    h = (x + residual).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + m * D + d, h, mask=mask)
    store_normed_and_quantized(
        h.to(tl.float32), weight_ptr, y_ptr, values_ptr, scale_ptr, scale_stride_m, scale_stride_b, m, D, eps, FP8_MAX,
        POWER_OF_TWO, KEEP, BLOCK_D, BLOCK_B, VECTOR,
    )  # fmt: skip


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = y, h, values, scale = _fake(x, residual, weight, eps, dtype, power_of_two, keep)
    if values.numel() == 0:
        return outputs
    x, residual = (t if t.stride(1) == 1 else t.contiguous() for t in (x, residual))
    M, D = x.shape
    block_d, num_warps = row_tile(D)
    _add_rms_norm_quantize_kernel[(M,)](
        x, residual, weight.contiguous(), y, h, values, in_memory(scale), x.stride(0), residual.stride(0),
        *scale.stride(), D, eps, FP8_MAX=torch.finfo(dtype).max, POWER_OF_TWO=power_of_two, KEEP=keep, BLOCK_D=block_d,
        BLOCK_B=max(block_d // 128, 1), VECTOR=16 // x.element_size(), num_warps=num_warps,
    )  # fmt: skip
    return outputs


def _check(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> None:
    if x.ndim != 2 or x.shape != residual.shape or x.dtype != residual.dtype or weight.shape != x.shape[1:]:
        raise ValueError(
            "add_rms_norm_quantize: want x and residual [M, D] of one dtype and weight [D], got "
            f"{list(x.shape)} {x.dtype}, {list(residual.shape)} {residual.dtype} and {list(weight.shape)}"
        )
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"add_rms_norm_quantize: want x in float16, bfloat16, float32 or float64, got {x.dtype}")
    check_blocks("add_rms_norm_quantize", dtype, 1, 128)


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, D = x.shape
    y = torch.empty((M, D) if keep else (0,), dtype=x.dtype, device=x.device)
    values = torch.empty((M, D), dtype=dtype, device=x.device)
    h = torch.empty((M, D), dtype=x.dtype, device=x.device)
    return y, h, values, empty_scale(values, 1, 128, power_of_two)


def _cost(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> Cost:
    read_and_kept = tensor_bytes(x) * (4 if keep else 3) + tensor_bytes(weight)
    # as many operations as the two ops
    return Cost(flops=10 * x.numel(), bytes=read_and_kept + quantized_bytes(x.shape, 1, 128, power_of_two))


def _samples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor, float, torch.dtype, bool, bool]]:
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
        x, residual, weight = (torch.randn(size, device=device, dtype=dtype) for size in (shape, shape, shape[1:]))
        yield x, residual, weight, 1e-6, to, power_of_two, keep


add_rms_norm_quantize = define(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype, bool power_of_two, bool keep)"
    " -> (Tensor y, Tensor h, Tensor values, Tensor scale)",
    reference=add_rms_norm_quantize_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=ONE_FLOAT8_STEP,
)
"""``add_rms_norm`` and ``quantize`` of its result in blocks of 1 x 128, bit by bit as the two give them.

Args:
    x, residual: ``[M, D]``, one dtype: float16, bfloat16 or float32 (float64 by the reference); rows may be strided.
    weight: ``[D]``, any floating dtype.
    eps: added to the mean square, in units of h**2.
    dtype, power_of_two: of ``quantize``.
    keep: whether somebody else wants y too, such as the backward pass.

Returns:
    ``y [M, D]``, contiguous, dtype of ``x`` (``[0]`` without ``keep``); ``h [M, D]`` likewise, always, since the next
    layer adds to it; ``values [M, D]`` and ``scale [M, ceil(D / 128)]`` as ``quantize`` gives them.

Raises:
    ValueError: ``x`` is no matrix, or shapes or dtypes differ.
    TypeError: ``x`` is not floating point of 16 bits or more, or ``dtype`` is no FP8 format.
"""

add_rms_norm_quantize.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
