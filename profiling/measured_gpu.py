"""What a GPU reaches: copying, and large matrix products in each dtype; the ceilings that benchmarks are a share of.

The datasheet's figures, in :mod:`deepfuse.ir.device`, are reached by nobody.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from deepfuse.ir.device import Device, device_row
from deepfuse.profiling.device_timing import device_timing, first_error

COPIED_BYTES = 2**30
SIZE = 8192
"""Rows, columns and depth of the products."""


def measured_gpu(device: torch.device, *, copied: int = COPIED_BYTES, size: int = SIZE, rounds: int = 10) -> Device:
    """This GPU: bytes a second of a copy, read and written; operations a second of products of random numbers.

    A dtype whose product fails here (FP8 before Hopper) has no figure.
    """
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = device_timing({"copy": lambda: target.copy_(source)}, device=device, rounds=rounds)["copy"]
    flops = {}
    for dtype, product in _products(size, device).items():
        if first_error(product, device) is None:
            flops[dtype] = 2 * size**3 / device_timing({"": product}, device=device, rounds=rounds)[""].median
    row = device_row(device)
    name = f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else row.name} (measured)"
    return replace(row, name=name, flops=flops, memory_bandwidth=2 * copied / copy.median)


def _products(size: int, device: torch.device) -> dict[torch.dtype, Callable[[], Tensor]]:
    # not zeros: they take less power, and so run faster than anybody's numbers
    numbers = torch.randn(size, size, device=device)
    found: dict[torch.dtype, Callable[[], Tensor]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found[dtype] = partial(_square, numbers.to(dtype))
    fp8, one = numbers.to(torch.float8_e4m3fn), torch.ones((), device=device)
    found[torch.float8_e4m3fn] = lambda: torch._scaled_mm(fp8, fp8.t(), one, one, out_dtype=torch.bfloat16)
    return found


def _square(x: Tensor) -> Tensor:
    return x @ x
