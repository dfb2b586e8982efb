"""Product of two FP8 matrices with scales by blocks: ``y = dequantize(a) @ dequantize(b).T (+ bias) (+ residual)``.

    y[m, n] = sum over blocks j of 128 along K of
        a_scale[m, j] * b_scale[n // b_rows, j] * sum over k in block j of a[m, k] * b[n, k]

The inner sum is what tensor cores do; the outer one is in float32 registers, since Hopper's tensor cores keep about 14
bits of an FP8 sum (see `ir/tensor_core.py`). Blocks of 1x128 and 128x128 share the 128 for that reason.
Its larger providers have files of their own: ``fp8_matmul_triton``, ``fp8_matmul_gluon``, ``fp8_matmul_scaled_mm``.

Dims: M rows, N outputs, K inputs.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most, float32_result_at_most
from deepfuse.ir.sizes import check_value
from deepfuse.ir.tolerance import Tolerance
from deepfuse.ops.dequantize import check_scale, dequantize_ref
from deepfuse.ops.fp8_matmul_scaled_mm import scaled_mm, scaled_mm_refuses
from deepfuse.ops.fp8_matmul_triton import FEW_ROWS, launch
from deepfuse.ops.linear import MATVEC_ROWS, matvec
from deepfuse.ops.quantize import FP8_DTYPES, quantize, scale_shape


def fp8_matmul_ref(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    compute = torch.promote_types(a.dtype if a.element_size() > 1 else dtype, torch.float32)
    a_MK = dequantize_ref(a, a_scale, 1, 128, compute)
    b_NK = dequantize_ref(b, b_scale, b_rows, 128, compute)
    y_MN = torch.mm(a_MK, b_NK.t())
    if bias is not None:
        y_MN = y_MN + bias.to(compute)
    if residual is not None:
        y_MN = y_MN + residual.to(compute)
    return y_MN.to(dtype)


def _matvec(*args: Any) -> Tensor:
    a, a_scale, b, b_scale, b_rows, bias, residual, dtype = args
    compute = torch.promote_types(dtype, torch.float32)
    b_NK = dequantize_ref(b, b_scale, b_rows, 128, compute)
    y_MN = matvec(dequantize_ref(a, a_scale, 1, 128, compute), b_NK, None if bias is None else bias.to(compute))
    return (y_MN if residual is None else y_MN + residual).to(dtype)


def _matvec_supports(a: Tensor, *args: Any) -> str | None:
    return None if at_most(a.shape[0], MATVEC_ROWS) and a.shape[0] > 0 else f"rows are not 1 to {MATVEC_ROWS}"


def _gluon(*args: Any) -> Tensor:
    # here, since Gluon takes as long to import as all ops together
    from deepfuse.ops.fp8_matmul_gluon import launch

    a, a_scale, b, b_scale, *_, dtype = args
    return launch(a, a_scale, b, b_scale, dtype)


def _gluon_supports(*args: Any) -> str | None:
    a, a_scale, b, _, b_rows, bias, residual, dtype = args
    if at_most(a.shape[0], FEW_ROWS):
        return f"the kernel is made for up to {FEW_ROWS} rows"
    if b_rows != 128:
        return "takes one scale of b for 128 rows"
    if bias is not None or residual is not None:
        return "adds nothing"
    return gluon_refuses(a, a_scale, b, b.shape[0], dtype)


def gluon_refuses(a: Tensor, a_scale: Tensor, b: Tensor, N: Any, dtype: torch.dtype) -> str | None:
    """What the tiles of `ops/fp8_matmul_gluon.py` are not made for."""
    if dtype not in (torch.bfloat16, torch.float32):
        return "computes in float32"
    if a_scale.dtype != torch.float32:
        return "takes float32 scales"
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        return "takes E4M3"
    if not isinstance(N, int) or N * dtype.itemsize % 16:
        return f"TMA writes rows of a multiple of 16 bytes, got {N} of {dtype}"
    if a.device.type == "cuda" and torch.cuda.get_device_capability(a.device)[0] != 9:
        return "made for sm_90"
    return None


def _check(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> None:
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"fp8_matmul: want a [M, K] and b [N, K], got {list(a.shape)} and {list(b.shape)}")
    (M, K), N = a.shape, b.shape[0]
    check_value(
        K == b.shape[1], lambda: f"fp8_matmul: want a [M, K] and b [N, K], got {list(a.shape)} and {list(b.shape)}"
    )
    if a.dtype not in FP8_DTYPES or b.dtype not in FP8_DTYPES:
        raise TypeError(f"fp8_matmul: want a and b in float8_e4m3fn or float8_e5m2, got {a.dtype} and {b.dtype}")
    if b_rows not in (1, 128):
        raise ValueError(f"fp8_matmul: want b_rows 1 or 128, got {b_rows}")
    check_scale("fp8_matmul", "a_scale", a_scale, scale_shape(a.shape, 1, 128))
    check_scale("fp8_matmul", "b_scale", b_scale, scale_shape(b.shape, b_rows, 128))
    if a_scale.dtype != b_scale.dtype:
        raise TypeError(f"fp8_matmul: want scales of one dtype, got {a_scale.dtype} and {b_scale.dtype}")
    if bias is not None and (bias.ndim != 1 or not bias.is_floating_point()):
        raise ValueError(f"fp8_matmul: want a floating-point bias [N], got {list(bias.shape)} {bias.dtype}")
    if bias is not None:
        check_value(bias.shape[0] == N, lambda: f"fp8_matmul: want bias [{N}], got {list(bias.shape)}")
    if residual is not None and (residual.ndim != 2 or not residual.is_floating_point()):
        raise ValueError(f"fp8_matmul: want a floating-point residual [M, N], got {list(residual.shape)}")
    if residual is not None:
        for size, wanted in zip(residual.shape, (M, N), strict=True):
            check_value(size == wanted, lambda: f"fp8_matmul: want residual [{M}, {N}], got {list(residual.shape)}")
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"fp8_matmul: want dtype bfloat16, float32 or float64, got {dtype}")


def _fake(*args: Any) -> Tensor:
    a, _, b, *_, dtype = args
    return torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, bias, residual, _ = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, residual)]


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    bias, residual = ctx.dtypes
    dbias = None if bias is None else dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias)
    return None, None, None, None, None, dbias, None if residual is None else dy.to(residual), None


def _cost(*args: Any) -> Cost:
    a, a_scale, b, b_scale, _, bias, residual, dtype = args
    (M, K), N = a.shape, b.shape[0]
    read = tensor_bytes(a, a_scale, b, b_scale, bias, residual)
    return Cost(flops=2 * M * N * K, bytes=read + M * N * dtype.itemsize)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    e4m3, e5m2 = FP8_DTYPES

    def operands(M: int, N: int, K: int, b_rows: int, fp8: torch.dtype, power_of_two: bool) -> tuple[Any, ...]:
        a = quantize(torch.randn(M, K, device=device), e4m3, 1, 128, power_of_two)
        b = quantize(torch.randn(N, K, device=device) / max(K, 1) ** 0.5, fp8, b_rows, 128, power_of_two)
        return (*a, *b, b_rows)

    def terms(M: int, N: int) -> tuple[Tensor, Tensor]:
        return torch.randn(N, device=device, dtype=dtype), torch.randn(M, N, device=device, dtype=dtype)

    # one row, all terms; no rows; partial blocks in every dimension; K split; many rows; scales in other formats
    yield (*operands(1, 8, 16, 128, e4m3, False), *terms(1, 8), dtype)
    yield (*operands(0, 8, 128, 128, e4m3, False), None, None, dtype)
    yield (*operands(5, 200, 300, 128, e4m3, True), terms(5, 200)[0], None, dtype)
    yield (*operands(3, 72, 1100, 128, e5m2, False), *terms(3, 72), dtype)
    yield (*operands(70, 130, 200, 1, e4m3, False), None, terms(70, 130)[1], dtype)
    yield (*operands(80, 144, 256, 128, e4m3, False), None, None, dtype)
    # the weight gradient: what lies along the rows is summed over, and scales are row-major there
    dy, dy_scale = quantize(torch.randn(130, 70, device=device) / 130**0.5, e4m3, 128, 1, False)
    x, x_scale = quantize(torch.randn(130, 48, device=device), e4m3, 128, 1, False)
    yield dy.t(), dy_scale.t(), x.t(), x_scale.t(), 1, None, None, dtype


fp8_matmul = define(
    "fp8_matmul(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int b_rows, Tensor? bias, Tensor? residual, "
    "ScalarType dtype) -> Tensor",
    reference=fp8_matmul_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
    # of a float32 result: products of FP8 are exact, and sums are those of any float32 product
    tolerance=dict.fromkeys(FP8_DTYPES, Tolerance(atol=1e-5, rtol=1.3e-6)),
)
"""Multiply block-scaled FP8 matrices; sums beyond 128 of K, scales, bias and residual in float32, rounded once.

It has gradients for bias and residual. Those for what was quantized are products of other quantized matrices, which the
block that quantized writes out.

Args:
    a: ``[M, K]``, ``float8_e4m3fn`` or ``float8_e5m2``. Copied where K is not contiguous, or no multiple of 16.
    a_scale: ``[M, ceil(K / 128)]``, float32 or ``float8_e8m0fnu``, any strides (column-major is read best).
    b: ``[N, K]``, as ``a``.
    b_scale: ``[ceil(N / b_rows), ceil(K / 128)]``, dtype of ``a_scale``, any strides.
    b_rows: 128 for weights, 1 for the gradient of a weight.
    bias: ``[N]`` or ``None``; residual: ``[M, N]`` or ``None``; floating point.
    dtype: of the result, bfloat16 or float32 (float64 by the reference).

Returns:
    ``[M, N]``, contiguous; the same from run to run.

Raises:
    ValueError: shapes do not fit, or ``b_rows`` is another.
    TypeError: dtypes other than these, or scales of two dtypes.
"""

fp8_matmul.provide("triton", launch, priority={"cuda": 10}, supports=float32_result_at_most)
# not before "triton" and "torch" until it has been measured against them
fp8_matmul.provide("gluon", _gluon, priority={"cuda": 5}, supports=_gluon_supports)
fp8_matmul.provide("torch", scaled_mm, priority={"cuda": 20}, supports=scaled_mm_refuses)
fp8_matmul.provide("matvec", _matvec, priority={"cpu": 10}, supports=_matvec_supports, inline=True)
