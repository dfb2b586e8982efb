"""``fp8_matmul`` in Triton: any number of rows, all kinds of scales, bias and residual.

For few rows the tile is computed transposed and K goes to several programs, whose sums a second kernel adds up in order.

Dims: M rows, N outputs, K inputs; P and Q, the rows and columns of what is computed: M and N, or transposed N and M.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.interpreter import interpreted
from deepfuse.ops.dequantize import in_memory, load_column_scales, widen_scale
from deepfuse.ops.k_major import k_major

FEW_ROWS = 64
"""Up to so many rows the kernel computes ``y.T``: Hopper's instruction has 64 rows, better the weight's than padding."""
PROCESSORS = 132
"""Of an H100 and an H200: how many programs run at a time at least."""


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


def launch(
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
