"""Cases of matrix products: FP8 over DeepSeek-V3's shapes, dense and in groups, beside the same product in bfloat16."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from cases import Case, Work, providers
from torch import Tensor

from deepfuse.ir.op import Op
from deepfuse.ops.fp8_grouped_matmul import fp8_grouped_matmul
from deepfuse.ops.fp8_grouped_matmul_wgrad import fp8_grouped_matmul_wgrad
from deepfuse.ops.fp8_matmul import fp8_matmul
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.grouped_matmul_wgrad import grouped_matmul_wgrad
from deepfuse.ops.quantize import quantize

WEIGHTS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168))
"""N and K of the projections of attention and of an expert."""
ROWS = (1, 16, 64, 128, 512, 4096)
GROUPS = ((4, 8192), (8, 4096), (32, 192), (256, 4))
"""Experts, and rows of each: prompts on few ranks, a decode step of many sequences on some, and of 128 on one."""
EXPERTS = ((4096, 7168), (7168, 2048))
"""N and K of the two products of an expert."""
E4M3 = torch.float8_e4m3fn


def dense(
    device: torch.device,
    rows: Iterable[int] = ROWS,
    weights: Iterable[tuple[int, int]] = WEIGHTS,
    refused: Mapping[str, str] = {},
) -> Iterator[Case]:
    """``fp8_matmul``, few rows first.

    Args:
        refused: ``op.provider`` that are not run here -> why.
    """
    weights = tuple(weights)
    for M in rows:
        for N, K in weights:
            yield Case(f"fp8_matmul {M} x {N} x {K}", lambda M=M, N=N, K=K: _dense(device, M, N, K, refused))  # type: ignore[misc]


def _dense(device: torch.device, M: int, N: int, K: int, refused: Mapping[str, str]) -> Work:
    weight, x = _random(device, N, K) / K**0.5, _random(device, M, K)
    a, b = quantize(x, E4M3, 1, 128, False), quantize(weight, E4M3, 128, 128, False)
    args = (*a, *b, 128, None, None, torch.bfloat16)
    return _beside(fp8_matmul, args, device, refused, {"bfloat16": lambda: x @ weight.t()}, M=M, N=N, K=K)


def grouped(
    device: torch.device,
    groups: Iterable[tuple[int, int]] = GROUPS,
    experts: Iterable[tuple[int, int]] = EXPERTS,
    refused: Mapping[str, str] = {},
) -> Iterator[Case]:
    """``fp8_grouped_matmul`` and the gradient of its weight; groups of one size."""
    groups = tuple(groups)
    for N, K in experts:
        for E, rows in groups:
            sizes = f"{E} x {rows} x {N} x {K}"
            arguments = device, E, rows, N, K, refused
            yield Case(f"fp8_grouped_matmul {sizes}", lambda a=arguments: _grouped(*a))  # type: ignore[misc]
            if rows >= 128:
                yield Case(f"fp8_grouped_matmul_wgrad {sizes}", lambda a=arguments: _wgrad(*a))  # type: ignore[misc]


def _grouped(device: torch.device, E: int, rows: int, N: int, K: int, refused: Mapping[str, str]) -> Work:
    weight, x, offsets = _random(device, E, N, K) / K**0.5, _random(device, E * rows, K), _ends(device, E, rows)
    pairs = *quantize(x, E4M3, 1, 128, False), *quantize(weight, E4M3, 128, 128, False)
    args = (*pairs, offsets, torch.bfloat16)
    bf16 = {"bfloat16": lambda: grouped_matmul(x, weight, offsets)}
    return _beside(fp8_grouped_matmul, args, device, refused, bf16, E=E, M=E * rows, N=N, K=K)


def _wgrad(device: torch.device, E: int, rows: int, N: int, K: int, refused: Mapping[str, str]) -> Work:
    dy, x, offsets = _random(device, E * rows, N), _random(device, E * rows, K), _ends(device, E, rows)
    pairs = *quantize(dy, E4M3, 128, 1, False), *quantize(x, E4M3, 128, 1, False)
    args = (*pairs, offsets, torch.float32)
    bf16 = {"bfloat16": lambda: grouped_matmul_wgrad(dy, x, offsets)}
    return _beside(fp8_grouped_matmul_wgrad, args, device, refused, bf16, E=E, M=E * rows, N=N, K=K)


def _beside(op: Op, args: tuple, device: torch.device, refused: Mapping[str, str], bf16: dict, **sizes: int) -> Work:
    """The op's kernels (its reference where there are none), and the product in bfloat16."""
    able = {name: fn for name, fn in providers(op, args, device).items() if f"{op.name}.{name}" not in refused}
    able = able or {"reference": lambda: op.reference(*args)}
    return Work(alternatives={**able, **bf16}, cost=op.cost(*args), dtype=E4M3, facts=sizes)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _ends(device: torch.device, E: int, rows: int) -> Tensor:
    return torch.arange(rows, E * rows + 1, rows, dtype=torch.int32, device=device)
