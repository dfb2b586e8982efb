"""``fp8_matmul`` by torch's ``scaled_mm``, which has scales by blocks on Hopper.

Dims: M rows, N outputs, K inputs.
Source: the layouts that ``scaled_mm`` wants: `ScaledBlas.cpp` of pytorch/pytorch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deepfuse.ir.provider import at_most
from deepfuse.ops.fp8_matmul_triton import FEW_ROWS


def scaled_mm(*args: Any) -> Tensor:
    a, a_scale, b, b_scale, b_rows, _, _, dtype = args
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


def scaled_mm_refuses(*args: Any) -> str | None:
    a, a_scale, b, _, _, bias, residual, dtype = args
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
