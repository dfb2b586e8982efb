"""FP8 matrices as Hopper's tensor cores read them: what is summed over is contiguous, and rows begin at 16 bytes.

bfloat16 they take either way, FP8 not; and what does not lie on 16 bytes would be copied to shared memory byte by byte.
A gradient's products read matrices the other way round: a copy reads and writes them once, which is little beside a
product that reads them once for each tile of the other operand.

Dims: B matrices, M rows, K columns.
Source: PTX ISA 8.0, section 9.7.14.5 (`wgmma`): only 16-bit types may be transposed in shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ops.quantize import as_batch


@triton.jit
def _copy_kernel(
    x_ptr,
    y_ptr,
    stride_b,
    stride_m,
    stride_k,
    M,
    K,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile a program; columns from K up to the width become zeros."""
    b = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    ptrs = x_ptr + b * stride_b + m[:, None] * stride_m + k[None, :] * stride_k
    x = tl.load(ptrs, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
    y_ptrs = y_ptr + (b * M + m)[:, None] * width + k[None, :]
    tl.store(y_ptrs, x, mask=(m < M)[:, None] & (k < width)[None, :])


def k_major(x: Tensor) -> Tensor:
    """``x [..., M, K]`` as it is, or a copy of it that lies as tensor cores want.

    Where K is no multiple of 16 the copy has ``ceil(K / 128) * 128`` columns, of which those from K on are zeros.
    """
    K = x.shape[-1]
    whole = x.stride(-1) == 1 and K % 16 == 0 and x.data_ptr() % 16 == 0
    if whole and all(stride % 16 == 0 for stride in x.stride()[:-1]):
        return x
    width = K if K % 16 == 0 else (K + 127) // 128 * 128
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x_BMK = as_batch(x)
    B, M, _ = x_BMK.shape
    _copy_kernel[(triton.cdiv(M, 64), triton.cdiv(width, 128), B)](
        # the interpreter would convert float8
        x_BMK.view(torch.uint8),
        y.view(torch.uint8),
        *x_BMK.stride(),
        M,
        K,
        width,
        BLOCK_M=64,
        BLOCK_K=128,
        num_warps=4,
    )
    return y
