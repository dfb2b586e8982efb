"""Rows of numbers, and the roofline drawn from them."""

import pytest
import torch

from deepfuse.ir.cost import Cost
from deepfuse.ir.device import CPU, DEVICES, H100, H200, Device, device_row, measured_cpu

ROW = Device(name="x", flops={torch.float32: 100.0}, memory_bandwidth=10.0, memory_bytes=1, launch_seconds=1.0)


@pytest.mark.parametrize(
    ("flops", "bytes", "seconds"), [(1000, 10, 10.0), (10, 1000, 100.0), (100, 10, 1.0), (0, 0, 0.0), (0, 5, 0.5)]
)
def test_time_is_the_larger_of_arithmetic_and_memory(flops: int, bytes: int, seconds: float) -> None:
    assert ROW.seconds(Cost(flops=flops, bytes=bytes), torch.float32) == seconds


def test_narrow_dtypes_are_not_slower() -> None:
    cost = Cost(flops=10**15, bytes=0)
    for row in DEVICES.values():
        assert row.seconds(cost, torch.bfloat16) <= row.seconds(cost, torch.float32) <= row.seconds(cost, torch.float64)


def test_figures_are_those_of_the_datasheets() -> None:
    # H100 SXM5: 989 TFLOP/s and 3.35 TB/s, so that 295 operations a byte balance
    assert H100.flops[torch.bfloat16] / H100.memory_bandwidth == pytest.approx(295.2, abs=0.1)
    assert H200.flops == H100.flops and H200.memory_bandwidth == 4.8e12
    assert all(key == row.name for key, row in DEVICES.items())


def test_a_row_says_what_kind_of_device_it_is() -> None:
    kinds = {row.name: row.kind for row in DEVICES.values()}
    assert kinds == {"H100": "cuda", "H800": "cuda", "H200": "cuda", "B200": "cuda", "cpu": "cpu"}
    assert device_row(torch.device("cpu")).kind == "cpu"


@pytest.mark.parametrize(
    ("name", "row"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H800", "H800"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200")],
)
def test_a_gpu_is_known_by_its_name(name: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device_row(torch.device("cuda")) is DEVICES[row]


def test_another_gpu_counts_as_the_one_kernels_are_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    assert device_row(torch.device("cuda", 1)) is H100


def test_the_cpu_has_nominal_figures() -> None:
    assert device_row(torch.device("cpu")) is CPU


def test_this_cpu_measured() -> None:
    row = measured_cpu(seconds=0.01)
    assert row.name == "cpu (measured)"
    # any machine: more than a desktop computer of 1990, less than a rack of GPUs
    for figure in (row.flops[torch.float32], row.flops[torch.bfloat16], row.memory_bandwidth):
        assert 1e6 < figure < 1e15
    assert row.flops[torch.float64] == CPU.flops[torch.float64]
    assert row.seconds(Cost(flops=10**9, bytes=10**9), torch.float32) > 0
