"""``fp8_grouped_matmul`` with room for as many rows in every group: ``y[e, c] = dequant(weight)[e] @ dequant(x)[e, c]``.

    group e owns the first counts[e] of its C rows; the others of y are zero

Shapes do not depend on who goes where, so a captured decode step serves every routing; a group without rows costs no
read of its weight.
Dims: E groups (experts), C rows a group has room for, K inputs, N outputs, B = ceil(K / 128) blocks of K.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; the layout is DeepGEMM's "masked" one
(github.com/deepseek-ai/DeepGEMM), except that it leaves the other rows undefined.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_result_at_most
from deepfuse.ops.dequantize import dequantize_ref
from deepfuse.ops.fp8_grouped_matmul import (
    check_groups,
    launch_groups,
)
from deepfuse.ops.quantize import quantize_ref


def fp8_grouped_matmul_masked_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    y_ECN = dequantize_ref(x, x_scale, 1, 128, compute) @ dequantize_ref(weight, weight_scale, 128, 128, compute).mT
    unused_EC1 = torch.arange(x.shape[1], device=x.device)[:, None] >= counts[:, None, None]
    # not a product with zero: unused rows may hold anything
    return y_ECN.masked_fill(unused_EC1, 0.0).to(dtype)


def _launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    (E, C, _), N = x.shape, weight.shape[1]
    y = x.new_empty(E, C, N, dtype=dtype)
    return launch_groups(x.flatten(0, 1), x_scale, weight, weight_scale, counts, y, capacity=C)


def _check(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor, dtype: torch.dtype
) -> None:
    if (
        x.ndim != 3
        or weight.ndim != 3
        or x.shape[0] != weight.shape[0]
        or x.shape[2] != weight.shape[2]
        or counts.shape != weight.shape[:1]
    ):
        raise ValueError(
            "fp8_grouped_matmul_masked: want x [E, C, K], weight [E, N, K] and counts [E], got "
            f"{list(x.shape)}, {list(weight.shape)} and {list(counts.shape)}"
        )
    check_groups("fp8_grouped_matmul_masked", x, x_scale, weight, weight_scale, counts, dtype)


def _fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[1], dtype=dtype)


def _cost(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor, dtype: torch.dtype) -> Cost:
    # counts are values, which a cost may not read: every row counts
    (E, C, K), N = x.shape, weight.shape[1]
    return Cost(
        flops=2 * E * C * N * K, bytes=tensor_bytes(x, x_scale, weight, weight_scale) + E * C * N * dtype.itemsize
    )


def _samples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]]:
    # one row; a full group, an empty one and one in between, in partial blocks; several tiles of rows; no room
    for counts, C, N, K, power_of_two in [
        ([1], 1, 8, 16, False),
        ([4, 0, 3], 4, 140, 132, True),
        ([0, 130], 140, 24, 48, False),
        ([0], 0, 8, 8, False),
    ]:
        E = len(counts)
        x = torch.randn(E, C, K, device=device)
        weight = torch.randn(E, N, K, device=device) / K**0.5
        yield (
            *quantize_ref(x, torch.float8_e4m3fn, 1, 128, power_of_two),
            *quantize_ref(weight, torch.float8_e4m3fn, 128, 128, power_of_two),
            torch.tensor(counts, device=device, dtype=torch.int32),
            dtype,
        )


fp8_grouped_matmul_masked = define(
    "fp8_grouped_matmul_masked(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor counts,"
    " ScalarType dtype) -> Tensor",
    reference=fp8_grouped_matmul_masked_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""Multiply the first rows of each group by its matrix, in FP8.

Args:
    x: ``[E, C, K]`` float8; rows of a group past its count may hold anything.
    x_scale: ``[E, C, ceil(K / 128)]``, one for each row and 128 columns.
    weight: ``[E, N, K]`` float8.
    weight_scale: ``[E, ceil(N / 128), ceil(K / 128)]``, one for each 128 x 128; dtype of ``x_scale``.
    counts: ``[E]`` int32, from 0 to C. Stays on the device: no synchronisation.
    dtype: of the result, bfloat16 or float32.

Returns:
    ``[E, C, N]``, zero past each group's count; sums as in ``fp8_grouped_matmul``.

Raises:
    ValueError: shapes do not fit.
    TypeError: a dtype is another, or the two scales' differ.
"""

fp8_grouped_matmul_masked.provide("triton", _launch, priority={"cuda": 10}, supports=float32_result_at_most)
