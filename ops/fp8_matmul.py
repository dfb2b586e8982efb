"""Product of two FP8 matrices with scales by blocks: ``y = dequantize(a) @ dequantize(b).T (+ bias) (+ residual)``.

    y[m, n] = sum over blocks j of 128 along K of
        a_scale[m, j] * b_scale[n // b_rows, j] * sum over k in block j of a[m, k] * b[n, k]

The inner sum is what tensor cores do; the outer one is in float32 registers, since Hopper's tensor cores keep about 14
bits of an FP8 sum (see `ir/tensor_core.py`). Blocks of 1x128 and 128x128 share the 128 for that reason.

Dims: M rows, N outputs, K inputs.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; the layouts torch's ``scaled_mm`` wants: `ScaledBlas.cpp` of
pytorch/pytorch.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most
from deepfuse.ir.tolerance import Tolerance
from deepfuse.ops.dequantize import check_scale, dequantize_ref, in_memory, load_column_scales, widen_scale
from deepfuse.ops.k_major import k_major
from deepfuse.ops.linear import MATVEC_ROWS, matvec
from deepfuse.ops.quantize import FP8_DTYPES, expand_scale, quantize, scale_shape

FEW_ROWS = 64
"""Up to so many rows the kernel computes ``y.T``: Hopper's instruction has 64 rows, better the weight's than padding."""
PROCESSORS = 132
"""Of an H100 and an H200: how many programs run at a time at least."""


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
    a_MK = a.to(compute) * expand_scale(a_scale.to(compute), a.shape, 1, 128)
    b_NK = b.to(compute) * expand_scale(b_scale.to(compute), b.shape, b_rows, 128)
    y_MN = torch.mm(a_MK, b_NK.t())
    if bias is not None:
        y_MN = y_MN + bias.to(compute)
    if residual is not None:
        y_MN = y_MN + residual.to(compute)
    return y_MN.to(dtype)


def _matvec(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    b_NK = dequantize_ref(b, b_scale, b_rows, 128, compute)
    y_MN = matvec(dequantize_ref(a, a_scale, 1, 128, compute), b_NK, None if bias is None else bias.to(compute))
    return (y_MN if residual is None else y_MN + residual).to(dtype)


def _matvec_supports(a: Tensor, *args: Any) -> str | None:
    return None if at_most(a.shape[0], MATVEC_ROWS) and a.shape[0] > 0 else f"rows are not 1 to {MATVEC_ROWS}"


@triton.jit
def _fp8_matmul_kernel(
    p_ptr,
    p_scale_ptr,
    q_ptr,
    q_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    p_stride,
    q_stride,
    p_scale_stride,
    p_scale_stride_k,
    q_scale_stride,
    q_scale_stride_k,
    residual_stride_p,
    residual_stride_q,
    y_stride_p,
    y_stride_q,
    y_stride_split,
    P,
    Q,
    K,
    blocks_a_split,
    P_ROWS: tl.constexpr,
    Q_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RASTER: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):
    """One tile of ``p @ q.T`` a program, over one share of K. ``a`` and ``b`` are p and q, or q and p for ``y.T``.

    BIAS: 0 for none, 1 if it belongs to the columns (q), 2 to the rows (p).
    """
    # RASTER row tiles go through the columns together: p and q are then read again from L2, not from memory
    tiles_p, tiles_q = tl.cdiv(P, BLOCK_P), tl.cdiv(Q, BLOCK_Q)
    band = tl.program_id(0) // (RASTER * tiles_q) * RASTER
    in_band = tl.program_id(0) % (RASTER * tiles_q)
    band_tiles = tl.minimum(tiles_p - band, RASTER)
    p = ((band + in_band % band_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    q = ((in_band // band_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    split = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)

    # rows beyond the last read the last again, so that loads need no mask; their results are not stored
    p_row, q_row = tl.minimum(p, P - 1), tl.minimum(q, Q - 1)
    first = split * blocks_a_split
    last = tl.minimum(first + blocks_a_split, tl.cdiv(K, BLOCK_K))
    p_ptrs = p_ptr + p_row[:, None] * p_stride + (first * BLOCK_K + k)[None, :]
    q_ptrs = q_ptr + q_row[None, :] * q_stride + (first * BLOCK_K + k)[:, None]
    p_scale_ptrs = p_scale_ptr + p_row // P_ROWS * p_scale_stride + first * p_scale_stride_k
    q_scale_ptrs = q_scale_ptr + q_row // Q_ROWS * q_scale_stride + first * q_scale_stride_k
    # a tile lies in one block of a scale that many rows share: it joins the other scale, one product less an element
    if Q_ROWS > 1:
        q_scale_ptrs = q_scale_ptr + (p * 0 + tl.min(q_row, 0)) // Q_ROWS * q_scale_stride + first * q_scale_stride_k
    elif P_ROWS > 1:
        p_scale_ptrs = p_scale_ptr + (q * 0 + tl.min(p_row, 0)) // P_ROWS * p_scale_stride + first * p_scale_stride_k

    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        p_scale = widen_scale(tl.load(p_scale_ptrs))
        if P_ROWS == 1 and Q_ROWS == 1:
            q_scale = load_column_scales(q_scale_ptrs)
        else:
            q_scale = widen_scale(tl.load(q_scale_ptrs))
        if WHOLE_K:
            p_tile = tl.load(p_ptrs)
            q_tile = tl.load(q_ptrs)
        else:
            p_tile = tl.load(p_ptrs, mask=(k < K - block * BLOCK_K)[None, :], other=0.0)
            q_tile = tl.load(q_ptrs, mask=(k < K - block * BLOCK_K)[:, None], other=0.0)
        if DOT_FLOAT32:
            p_tile, q_tile = p_tile.to(tl.float32), q_tile.to(tl.float32)
        # a sum of its own for every block: it begins at zero, and ends in float32
        partial = tl.dot(p_tile, q_tile, input_precision="ieee")
        if Q_ROWS > 1:
            acc += partial * (p_scale * q_scale)[:, None]
        elif P_ROWS > 1:
            acc += partial * (p_scale * q_scale)[None, :]
        else:
            acc += partial * p_scale[:, None] * q_scale[None, :]
        p_ptrs += BLOCK_K
        q_ptrs += BLOCK_K
        p_scale_ptrs += p_scale_stride_k
        q_scale_ptrs += q_scale_stride_k

    if BIAS == 1:
        acc += tl.load(bias_ptr + q_row).to(tl.float32)[None, :]
    elif BIAS == 2:
        acc += tl.load(bias_ptr + p_row).to(tl.float32)[:, None]
    mask = (p < P)[:, None] & (q < Q)[None, :]
    if RESIDUAL:
        residual_ptrs = residual_ptr + p[:, None] * residual_stride_p + q[None, :] * residual_stride_q
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + split.to(tl.int64) * y_stride_split + p[:, None] * y_stride_p + q[None, :] * y_stride_q
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits_kernel(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    residual_stride_m,
    residual_stride_n,
    M,
    N,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the shares of K in their order, so that the result does not change from run to run."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    y = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + (split * M + m) * N + n, mask=mask, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        residual_ptrs = residual_ptr + m * residual_stride_m + n.to(tl.int64) * residual_stride_n
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (M, K), N = a.shape, b.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    if y.numel() == 0:
        return y
    a, b = k_major(a), k_major(b)
    # zeros where K was no multiple of 16
    K = a.shape[1]
    bias = bias if bias is None else bias.contiguous()
    residual_strides = (0, 0) if residual is None else residual.stride()
    block_p, block_q, num_warps, num_stages = _tile(M, N)
    swapped = M <= FEW_ROWS
    P, Q = (N, M) if swapped else (M, N)
    tiles = triton.cdiv(P, block_p) * triton.cdiv(Q, block_q)
    blocks = triton.cdiv(K, 128)
    splits = _splits(tiles, blocks) if swapped else 1
    blocks_a_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, blocks_a_split) if blocks else 1
    out = y if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=a.device)
    operands = [(a, in_memory(a_scale), 1), (b, in_memory(b_scale), b_rows)]
    (p, p_scale, p_rows), (q, q_scale, q_rows) = reversed(operands) if swapped else operands
    ending = splits == 1
    _fp8_matmul_kernel[(tiles, splits)](
        p,
        p_scale,
        q,
        q_scale,
        y if bias is None else bias,
        y if residual is None else residual,
        out,
        p.stride(0),
        q.stride(0),
        *p_scale.stride(),
        *q_scale.stride(),
        *(reversed(residual_strides) if swapped else residual_strides),
        *((1, N) if swapped else (N, 1)),
        M * N,
        P,
        Q,
        K,
        blocks_a_split,
        P_ROWS=p_rows,
        Q_ROWS=q_rows,
        BIAS=0 if bias is None or not ending else 2 if swapped else 1,
        RESIDUAL=residual is not None and ending,
        WHOLE_K=K % 128 == 0,
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        BLOCK_K=128,
        RASTER=8,
        STAGES=num_stages,
        DOT_FLOAT32=interpreted(),
        num_warps=num_warps,
    )
    if not ending:
        _sum_splits_kernel[(M, triton.cdiv(N, 512))](
            out,
            y if bias is None else bias,
            y if residual is None else residual,
            y,
            *residual_strides,
            M,
            N,
            SPLITS=splits,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            BLOCK_N=512,
            num_warps=2,
        )
    return y


def _tile(M: int, N: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, its warps and its stages; with 128 of K a stage of 64 x 16 takes 10 KiB."""
    if M <= FEW_ROWS:
        # the weight is what is read: deep buffers, and one tile of few columns for all rows of a
        block_q = min(max(triton.next_power_of_2(M), 16), 64)
        return 64, block_q, 4, 6
    if triton.cdiv(M, 128) * triton.cdiv(N, 128) < PROCESSORS:
        # smaller tiles, so that all processors have one
        return 64, 64, 4, 4
    # 64 sums in float32 and 64 of the tensor cores a thread of eight warps
    return 128, 128, 8, 4


def _splits(tiles: int, blocks: int) -> int:
    """Into how many shares K goes, so that there are programs for all processors."""
    # a share of four blocks at least: fewer would spend their time on filling the pipeline
    return max(min(PROCESSORS // tiles, blocks // 4, 16), 1)


def _supports(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> str | None:
    return "computes in float32" if dtype == torch.float64 else None


def _torch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    M, N = a.shape[0], b.shape[0]
    if M == 0:
        return torch.empty((0, N), dtype=dtype, device=a.device)
    kinds = functional.ScalingType
    # column-major without padding: ours is, where M is a multiple of 4; else rows are added
    if M % 4:
        a, a_scale = _with_rows(a, -M % 4), _with_rows(a_scale, -M % 4)
    a_scale = a_scale.t().contiguous().t()
    if b_rows == 1:
        b_scale, kind = b_scale.t().contiguous().t(), kinds.BlockWise1x128
    else:
        # blocks of K padded to a multiple of 4
        b_scale, kind = functional.pad(b_scale, (0, -b_scale.shape[1] % 4)).contiguous().t(), kinds.BlockWise128x128
    y = functional.scaled_mm(
        a.contiguous(), b.contiguous().t(), a_scale, kinds.BlockWise1x128, b_scale, kind, output_dtype=dtype
    )
    return y[:M]


def _with_rows(x: Tensor, rows: int) -> Tensor:
    padded = torch.zeros((x.shape[0] + rows, x.shape[1]), dtype=x.dtype, device=x.device)
    padded[: x.shape[0]] = x
    return padded


def _torch_supports(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> str | None:
    if at_most(a.shape[0], FEW_ROWS):
        return f"the kernel is made for up to {FEW_ROWS} rows"
    if a_scale.dtype != torch.float32:
        return "scaled_mm takes float32 scales here"
    if dtype != torch.bfloat16:
        return "scaled_mm gives bfloat16"
    if bias is not None or residual is not None:
        return "scaled_mm would round before it adds"
    sizes = b.shape
    if any(not isinstance(size, int) or size % 16 or size == 0 for size in sizes):
        return f"scaled_mm wants N and K to be multiples of 16, got {list(sizes)}"
    if a.device.type == "cuda":
        capability = torch.cuda.get_device_capability(a.device)
        if capability[0] != 9:
            return f"scaled_mm has block scales on sm_90 only, got sm_{capability[0]}{capability[1]}"
        version = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
        if version < (12, 9):
            return f"scaled_mm has block scales from CUDA 12.9 on, got {torch.version.cuda}"
    return None


def _gluon(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    # here, since Gluon takes as long to import as all ops together
    from deepfuse.ops.fp8_matmul_gluon import launch

    return launch(a, a_scale, b, b_scale, dtype)


def _gluon_supports(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> str | None:
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
    torch._check_value(
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
        torch._check_value(bias.shape[0] == N, lambda: f"fp8_matmul: want bias [{N}], got {list(bias.shape)}")
    if residual is not None and (residual.ndim != 2 or not residual.is_floating_point()):
        raise ValueError(f"fp8_matmul: want a floating-point residual [M, N], got {list(residual.shape)}")
    if residual is not None:
        for size, wanted in zip(residual.shape, (M, N), strict=True):
            torch._check_value(
                size == wanted, lambda: f"fp8_matmul: want residual [{M}, {N}], got {list(residual.shape)}"
            )
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"fp8_matmul: want dtype bfloat16, float32 or float64, got {dtype}")


def _fake(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, bias, residual, _ = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, residual)]


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    bias, residual = ctx.dtypes
    dbias = None if bias is None else dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias)
    return None, None, None, None, None, dbias, None if residual is None else dy.to(residual), None


def _cost(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Cost:
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

fp8_matmul.provide("triton", _launch, priority={"cuda": 10}, supports=_supports)
# not before "triton" and "torch" until it has been measured against them
fp8_matmul.provide("gluon", _gluon, priority={"cuda": 5}, supports=_gluon_supports)
fp8_matmul.provide("torch", _torch, priority={"cuda": 20}, supports=_torch_supports)
fp8_matmul.provide("matvec", _matvec, priority={"cpu": 10}, supports=_matvec_supports, inline=True)
