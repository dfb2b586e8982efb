"""Devices as rows of numbers: what the cost model, the roofline and the simulation know of them.

GPU figures are the vendor's, dense (no sparsity): H100 SXM5 and H200 SXM datasheets (2024), B200 in the HGX B200
datasheet (2024). An H800 is an H100 with less NVLink and FP64. The CPU row is nominal, so that decisions made from it
are the same on every machine; :func:`measured_cpu` measures this one.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from deepfuse.ir.cost import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One kind of device.

    Attributes:
        flops: dtype -> floating-point operations a second of dense matrix products.
        memory_bandwidth: bytes a second.
        memory_bytes: capacity.
        launch_seconds: what one more kernel costs when nothing hides it.
        kind: of ``torch.device``: its type.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    memory_bandwidth: float
    memory_bytes: int
    launch_seconds: float
    kind: str = "cuda"

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """The larger of arithmetic and memory time (the roofline of Williams et al. 2009)."""
        return max(cost.flops / self.flops[dtype], cost.bytes / self.memory_bandwidth)


GIB = 1 << 30
H100 = Device(
    name="H100",
    flops={
        torch.float32: 67e12,
        torch.bfloat16: 989e12,
        torch.float16: 989e12,
        torch.float8_e4m3fn: 1979e12,
        torch.float64: 67e12,
    },
    memory_bandwidth=3.35e12,
    memory_bytes=80 * GIB,
    launch_seconds=2e-6,
)
H800 = replace(H100, name="H800", flops={**H100.flops, torch.float64: 1e12})
H200 = replace(H100, name="H200", memory_bandwidth=4.8e12, memory_bytes=141 * GIB)
B200 = Device(
    name="B200",
    flops={
        torch.float32: 75e12,
        torch.bfloat16: 2250e12,
        torch.float16: 2250e12,
        torch.float8_e4m3fn: 4500e12,
        torch.float64: 37e12,
    },
    memory_bandwidth=7.7e12,
    memory_bytes=180 * GIB,
    launch_seconds=2e-6,
)
CPU = Device(
    name="cpu",
    flops={torch.float32: 100e9, torch.bfloat16: 200e9, torch.float16: 100e9, torch.float64: 50e9},
    memory_bandwidth=20e9,
    memory_bytes=16 * GIB,
    launch_seconds=5e-6,
    kind="cpu",
)
DEVICES: Mapping[str, Device] = {d.name: d for d in (H100, H800, H200, B200, CPU)}


def device_row(device: torch.device) -> Device:
    """The row for a device; an unknown GPU counts as an H100, as its kernels are written for it."""
    if device.type != "cuda":
        return CPU
    name = torch.cuda.get_device_name(device)
    return next((row for key, row in DEVICES.items() if key in name), H100)


def measured_cpu(seconds: float = 0.2) -> Device:
    """This machine's CPU: matrix products per dtype, and read bandwidth over an array far larger than the caches.

    Args:
        seconds: spent on each figure.
    """
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        flops[dtype] = 2 * 512**3 / _best_seconds(lambda a=a: a @ a, seconds)  # type: ignore[misc]
    array = torch.ones(64 * 1024 * 1024)
    bandwidth = array.numel() * 4 / _best_seconds(lambda: array.sum(), seconds)
    return replace(CPU, name="cpu (measured)", flops={**CPU.flops, **flops}, memory_bandwidth=bandwidth)


def _best_seconds(fn: Callable[[], object], budget: float) -> float:
    fn()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - start)
    return best
