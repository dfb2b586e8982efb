"""Weight gradient of a grouped matmul in FP8: ``dw[e] = sum over rows m of e of dequant(dy)[m]^T dequant(x)[m]``.

    group e owns rows offsets[e-1] .. offsets[e]; scales are of blocks of 128 rows, counted from row 0 whoever owns them

What is summed over are the rows, along which tensor cores want FP8 to be contiguous (bfloat16 they take either way). So
both operands are first copied into pieces: the rows that a group has in a block, transposed, zeros in the place of other
groups' rows. The product then reads whole pieces and knows nothing of borders. It walks the blocks of its group and adds
each one's sum in float32, since the tensor cores of Hopper keep about 14 bits while they accumulate.

Dims: M rows, E groups (experts), K inputs, N outputs, B = ceil(M / 128) blocks of rows.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2 (128x1 for the weight gradient); groups as in ``grouped_matmul``.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_result_at_most
from deepfuse.ir.sizes import check_value
from deepfuse.ops.dequantize import check_scale, dequantize_ref, in_memory, load_column_scales, widen_scale
from deepfuse.ops.fp8_grouped_matmul import check_ends
from deepfuse.ops.grouped_matmul_wgrad import grouped_matmul_wgrad_ref
from deepfuse.ops.quantize import FP8_DTYPES, quantize_ref, scale_shape


def fp8_grouped_matmul_wgrad_ref(
    dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    check_ends("fp8_grouped_matmul_wgrad", offsets, x.shape[0])
    compute = torch.promote_types(dtype, torch.float32)
    dy_MN, x_MK = (dequantize_ref(*pair, 128, 1, compute) for pair in ((dy, dy_scale), (x, x_scale)))
    return grouped_matmul_wgrad_ref(dy_MN, x_MK, offsets).to(dtype)


@triton.jit
def rows_of(offsets_ptr, e, M):
    """First row of a group, and the first after it; wrong offsets must not reach what is no row."""
    begin = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
    return tl.maximum(begin, 0), tl.minimum(tl.load(offsets_ptr + e), M)


@triton.jit
def _pieces_kernel(
    x_ptr,
    offsets_ptr,
    pieces_ptr,
    stride_m,
    stride_k,
    M,
    E,
    K,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``pieces[b + e, k, i]`` is row ``b * BLOCK_M + i`` of ``x`` if e owns it, else zero.

    Groups are sorted, so from one pair (block, group) to the next either number grows: their sum names one pair.
    """
    piece = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    end_E = tl.minimum(tl.load(offsets_ptr + e, mask=e < E, other=0), M)
    begin_E = tl.maximum(tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0), 0)
    first_E, last_E = begin_E // BLOCK_M + e, (end_E - 1) // BLOCK_M + e
    owner_E = (e < E) & (begin_E < end_E) & (first_E <= piece) & (piece <= last_E)
    if tl.sum(owner_E.to(tl.int32), 0) == 0:
        return
    group = tl.max(tl.where(owner_E, e, 0), 0)
    begin = tl.sum(tl.where(e == group, begin_E, 0), 0)
    end = tl.sum(tl.where(e == group, end_E, 0), 0)
    i = tl.arange(0, BLOCK_M)
    m = (piece - group) * BLOCK_M + i
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_m + k.to(tl.int64)[None, :] * stride_k
    x = tl.load(ptrs, mask=((m >= begin) & (m < end))[:, None] & (k < K)[None, :], other=0)
    # pieces are whole: rows past K are never read
    rows = piece.to(tl.int64) * K + k
    tl.store(pieces_ptr + rows[:, None] * BLOCK_M + i[None, :], tl.trans(x), mask=(k < K)[:, None])


@triton.jit
def _fp8_grouped_matmul_wgrad_kernel(
    dy_ptr,
    dy_scale_ptr,
    x_ptr,
    x_scale_ptr,
    offsets_ptr,
    dweight_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):
    """One tile of one group's gradient a program, from pieces; groups without rows get zeros."""
    e = tl.program_id(2)
    begin, end = rows_of(offsets_ptr, e, M)
    first = begin // BLOCK_M
    last = tl.where(begin < end, tl.cdiv(end, BLOCK_M), first)
    n0, k0 = tl.program_id(1).to(tl.int64) * BLOCK_N, tl.program_id(0).to(tl.int64) * BLOCK_K
    piece = (first + e).to(tl.int64)
    dy_ptr += (piece * N + n0) * BLOCK_M
    x_ptr += (piece * K + k0) * BLOCK_M
    dy_scale_ptr += first.to(tl.int64) * N + n0
    x_scale_ptr += first.to(tl.int64) * K + k0
    # within the tile, where 32 bits do: registers are what is short. Beyond the last the last is read again, so that
    # loads need no mask; results are not stored
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    n_read, k_read = tl.minimum(n, (N - 1 - n0).to(tl.int32)), tl.minimum(k, (K - 1 - k0).to(tl.int32))
    i = tl.arange(0, BLOCK_M)
    dy_tile, x_tile = n_read[:, None] * BLOCK_M + i[None, :], k_read[None, :] * BLOCK_M + i[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for _ in tl.range(first, last, num_stages=STAGES):
        dy, x = tl.load(dy_ptr + dy_tile), tl.load(x_ptr + x_tile)
        dy_scale = widen_scale(tl.load(dy_scale_ptr + n_read))
        x_scale = load_column_scales(x_scale_ptr + k_read)
        if DOT_FLOAT32:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        # a sum of its own for every block: it begins at zero, and ends in float32
        acc += tl.dot(dy, x, input_precision="ieee") * dy_scale[:, None] * x_scale[None, :]
        dy_ptr += tl.cast(N, tl.int64) * BLOCK_M
        x_ptr += tl.cast(K, tl.int64) * BLOCK_M
        dy_scale_ptr += N
        x_scale_ptr += K
    dweight_rows = dweight_ptr + (e.to(tl.int64) * N + n0 + n) * K + k0
    mask = (n < N - n0)[:, None] & (k < K - k0)[None, :]
    tl.store(dweight_rows[:, None] + k[None, :], acc.to(dweight_ptr.dtype.element_ty), mask=mask)


def _launch(dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    (M, N), K, E = dy.shape, x.shape[1], offsets.shape[0]
    dweight = torch.empty((E, N, K), dtype=dtype, device=x.device)
    if dweight.numel() == 0:
        return dweight
    if M == 0:
        return dweight.zero_()
    offsets = offsets.contiguous()
    dy_scale, x_scale = (in_memory(scale.contiguous()) for scale in (dy_scale, x_scale))
    dy, x = _pieces(dy, offsets), _pieces(x, offsets)
    # 64 sums in float32 and 64 of the tensor cores a thread of eight warps; 32 KiB a stage
    block_n, block_k = 128, 128
    _fp8_grouped_matmul_wgrad_kernel[(triton.cdiv(K, block_k), triton.cdiv(N, block_n), E)](
        dy,
        dy_scale,
        x,
        x_scale,
        offsets,
        dweight,
        M,
        N,
        K,
        BLOCK_M=128,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=4,
        DOT_FLOAT32=interpreted(),
        num_warps=8,
    )
    return dweight


def _pieces(x: Tensor, offsets: Tensor) -> Tensor:
    """``[B + E - 1, K, 128]``: of each block the rows of each group that has some there. The others stay undefined."""
    (M, K), E = x.shape, offsets.shape[0]
    # as many as there can be: each group but the first may share a block with the one before
    pieces = torch.empty((triton.cdiv(M, 128) + E - 1, K, 128), dtype=x.dtype, device=x.device)
    block_k = 64
    _pieces_kernel[(pieces.shape[0], triton.cdiv(K, block_k))](
        x.view(torch.uint8),
        offsets,
        pieces.view(torch.uint8),
        *x.stride(),
        M,
        E,
        K,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_M=128,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return pieces


def _check(dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype) -> None:
    op = "fp8_grouped_matmul_wgrad"
    if dy.ndim != 2 or x.ndim != 2 or offsets.ndim != 1:
        raise ValueError(
            f"{op}: want dy [M, N], x [M, K] and offsets [E], got "
            f"{list(dy.shape)}, {list(x.shape)} and {list(offsets.shape)}"
        )
    check_value(x.shape[0] == dy.shape[0], lambda: f"{op}: want x of {dy.shape[0]} rows, got {x.shape[0]}")
    if dy.dtype not in FP8_DTYPES or x.dtype not in FP8_DTYPES or offsets.dtype != torch.int32:
        raise TypeError(f"{op}: want float8 dy and x and int32 offsets, got {dy.dtype}, {x.dtype} and {offsets.dtype}")
    check_scale(op, "dy_scale", dy_scale, scale_shape(dy.shape, 128, 1))
    check_scale(op, "x_scale", x_scale, scale_shape(x.shape, 128, 1))
    if dy_scale.dtype != x_scale.dtype:
        raise TypeError(f"{op}: want two scales of one dtype, got {dy_scale.dtype} and {x_scale.dtype}")
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):  # float64 by the reference
        raise TypeError(f"{op}: want a result in bfloat16 or float32, got {dtype}")


def _fake(dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((offsets.shape[0], dy.shape[1], x.shape[1]), dtype=dtype, device=x.device)


def _cost(dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype) -> Cost:
    (M, N), K, E = dy.shape, x.shape[1], offsets.shape[0]
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(dy, dy_scale, x, x_scale) + E * N * K * dtype.itemsize)


def _samples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]]:
    e4m3, e5m2 = FP8_DTYPES
    # rows of each group: one row; empty groups; all in one; no row; several in a block, and several blocks, of partial
    # tiles; a border between two blocks
    for counts, N, K, power_of_two in [
        ([1], 8, 16, False),
        ([2, 0, 3, 1], 12, 20, True),
        ([0, 5, 0], 16, 8, False),
        ([0, 0], 8, 8, False),
        ([9, 140, 1, 200], 72, 150, False),
        ([128, 128], 130, 16, True),
    ]:
        offsets = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        M = sum(counts)
        # scaled so that sums over rows stay near one, where the default tolerance is made for
        dy = torch.randn(M, N, device=device) / max(M, 1) ** 0.5
        x = torch.randn(M, K, device=device)
        yield (
            *quantize_ref(dy, e5m2 if power_of_two else e4m3, 128, 1, power_of_two),
            *quantize_ref(x, e4m3, 128, 1, power_of_two),
            offsets,
            dtype,
        )


fp8_grouped_matmul_wgrad = define(
    "fp8_grouped_matmul_wgrad(Tensor dy, Tensor dy_scale, Tensor x, Tensor x_scale, Tensor offsets, ScalarType dtype)"
    " -> Tensor",
    reference=fp8_grouped_matmul_wgrad_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    inline_reference=False,
)
"""Multiply the transpose of each group's rows of ``dy`` by its rows of ``x``, in FP8.

Args:
    dy: ``[M, N]`` float8, any strides; x: ``[M, K]`` float8, any strides.
    dy_scale: ``[ceil(M / 128), N]``, float32 or ``float8_e8m0fnu``, one for each 128 rows of a column.
    x_scale: ``[ceil(M / 128), K]``, dtype of ``dy_scale``.
    offsets: ``[E]`` int32, end of each group's rows, never decreasing; the last is M. Stays on the device: no
        synchronisation.
    dtype: of the result, bfloat16 or float32.

Returns:
    ``[E, N, K]``; a group's rows in each block of 128 summed by themselves, then added up in float32; zero for groups
    without rows.

Raises:
    ValueError: shapes do not fit; from the reference also, offsets are out of range. On a GPU nobody looks at them: what
        is past M is not read.
    TypeError: a dtype is another, or the two scales' differ.
"""

fp8_grouped_matmul_wgrad.provide("triton", _launch, priority={"cuda": 10}, supports=float32_result_at_most)
