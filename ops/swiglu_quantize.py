"""SwiGLU and the FP8 values of its result: ``y = silu(gate) * up; values, scale = quantize(y)``, in blocks of 1 x 128.

What it saves: y is not read again; and not written, where nobody else wants it.
Dims: M rows, F width, B = ceil(F / 128) blocks of a row.
Source: DeepSeek-V3 (arXiv:2412.19437), sections 3.3.2 and 3.3.3.
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
from deepfuse.ops.quantize import FP8_DTYPES, check_blocks, empty_scale, quantize_ref, quantized_bytes, tile_of
from deepfuse.ops.swiglu import silu_times, strided_rows, swiglu_ref


def swiglu_quantize_ref(
    gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y_MF = swiglu_ref(gate, up)
    return (y_MF if keep else y_MF.new_empty(0), *quantize_ref(y_MF, dtype, 1, 128, power_of_two))


@triton.jit
def _swiglu_quantize_kernel(
    gate_ptr, up_ptr, y_ptr, values_ptr, scale_ptr, gate_stride, up_stride, scale_stride_m, scale_stride_b, M, F,
    FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per block of columns and some rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1)
    f = b * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (m < M)[:, None] & (f < F)[None, :]
    g = tl.load(gate_ptr + m[:, None] * gate_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + m[:, None] * up_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
    # what is quantized is the rounded product, which others may read too
    y = silu_times(g, u).to(gate_ptr.dtype.element_ty)
    y_tile = m[:, None] * F + f[None, :]
    if KEEP:
        tl.store(y_ptr + y_tile, y, mask=mask)
    y = y.to(tl.float32)
    scale, stored = scale_from_amax_bits(amax_bits(y, 1), FP8_MAX, POWER_OF_TWO)
    tl.store(scale_ptr + m * scale_stride_m + b * scale_stride_b, stored, mask=m < M)
    values = quotient_for_fp8(y, scale[:, None], FP8_MAX)
    tl.store(values_ptr + y_tile, values.to(values_ptr.dtype.element_ty), mask=mask)


def _launch(
    gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = y, values, scale = _fake(gate, up, dtype, power_of_two, keep)
    if values.numel() == 0:
        return outputs
    gate, up = strided_rows(gate), strided_rows(up)
    M, F = gate.shape
    block_m, block_f, num_warps = tile_of(M, 1, 128)
    _swiglu_quantize_kernel[(triton.cdiv(M, block_m), triton.cdiv(F, block_f))](
        gate, up, y, values, in_memory(scale), gate.stride(0), up.stride(0), *scale.stride(), M, F,
        FP8_MAX=torch.finfo(dtype).max, POWER_OF_TWO=power_of_two, KEEP=keep, BLOCK_M=block_m, BLOCK_F=block_f,
        num_warps=num_warps,
    )  # fmt: skip
    return outputs


def _check(gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool, keep: bool) -> None:
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu_quantize: want gate and up [M, F] of one shape and dtype, got {list(gate.shape)} {gate.dtype} "
            f"and {list(up.shape)} {up.dtype}"
        )
    check_blocks("swiglu_quantize", dtype, 1, 128)


def _fake(
    gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M, F = gate.shape
    y = torch.empty((M, F) if keep else (0,), dtype=gate.dtype, device=gate.device)
    values = torch.empty((M, F), dtype=dtype, device=gate.device)
    return y, values, empty_scale(values, 1, 128, power_of_two)


def _cost(gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool, keep: bool) -> Cost:
    read_and_kept = tensor_bytes(gate) * (3 if keep else 2)
    # as many operations as the two ops
    return Cost(flops=11 * gate.numel(), bytes=read_and_kept + quantized_bytes(gate.shape, 1, 128, power_of_two))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, torch.dtype, bool, bool]]:
    e4m3, e5m2 = FP8_DTYPES
    for shape, to, power_of_two, keep in [
        ((1, 8), e4m3, False, True),
        ((3, 200), e5m2, True, False),
        ((0, 16), e4m3, False, True),
        ((21, 256), e4m3, True, True),
        ((6, 576), e4m3, False, False),
    ]:
        gate, up = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        yield gate, up, to, power_of_two, keep
    # the two halves of one fused projection: strided rows
    gate, up = torch.randn(5, 288, device=device, dtype=dtype).chunk(2, dim=-1)
    yield gate, up, e4m3, False, True


swiglu_quantize = define(
    "swiglu_quantize(Tensor gate, Tensor up, ScalarType dtype, bool power_of_two, bool keep)"
    " -> (Tensor y, Tensor values, Tensor scale)",
    reference=swiglu_quantize_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=ONE_FLOAT8_STEP,
)
"""``swiglu`` and ``quantize`` of its result in blocks of 1 x 128, bit by bit as the two give them.

Args:
    gate, up: ``[M, F]``, one shape and dtype; rows may be strided (halves of one fused projection).
    dtype, power_of_two: of ``quantize``.
    keep: whether somebody else wants y too, such as the backward pass.

Returns:
    ``y [M, F]``, contiguous, dtype of ``gate`` (``[0]`` without ``keep``); ``values [M, F]`` and
    ``scale [M, ceil(F / 128)]`` as ``quantize`` gives them.

Raises:
    ValueError: shapes or dtypes of ``gate`` and ``up`` differ.
    TypeError: ``dtype`` is no FP8 format.
"""

swiglu_quantize.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
