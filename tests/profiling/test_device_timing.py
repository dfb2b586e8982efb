"""Timing by a device's events, with a device that is played here, and by the host's clock."""

from types import SimpleNamespace

import pytest
import torch

from deepfuse.profiling import device_timing as timing
from deepfuse.profiling.device_timing import DeviceLost, device_timing, first_error
from deepfuse.profiling.measured_gpu import measured_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class PlayedDevice:
    """A device whose clock goes on by what is run: what a call takes in milliseconds, a flush one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.clock, self.slept, self.flushed, self.hangs, self.dead = 0.0, 0, 0, False, False
        cuda = SimpleNamespace(
            Event=lambda **options: PlayedEvent(self), _sleep=self.sleep, synchronize=self.synchronize
        )
        names = {name: getattr(torch, name) for name in ("uint8", "device")}
        monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda, empty=lambda *a, **k: self, **names))

    def sleep(self, cycles: int) -> None:
        self.slept += 1

    def zero_(self) -> None:
        self.flushed += 1
        self.clock += 1

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("an illegal memory access was encountered")

    def run(self, milliseconds: float) -> None:
        self.clock += milliseconds


class PlayedEvent:
    def __init__(self, device: PlayedDevice):
        self.device = device

    def record(self) -> None:
        self.time = self.device.clock

    def query(self) -> bool:
        return not self.device.hangs

    def elapsed_time(self, end: "PlayedEvent") -> float:
        return end.time - self.time


def test_the_call_alone_is_timed(monkeypatch):
    device = PlayedDevice(monkeypatch)
    calls = []
    alternatives = {"a": lambda: (calls.append("a"), device.run(2)), "b": lambda: (calls.append("b"), device.run(3))}
    found = device_timing(alternatives, device=CUDA, cold=True, rounds=5)
    assert {name: t.median for name, t in found.items()} == pytest.approx({"a": 2e-3, "b": 3e-3})
    # a first call of each, then in turn
    assert calls == ["a", "b"] * 6
    assert device.slept == device.flushed == 10
    device_timing(alternatives, device=CUDA, rounds=5)
    assert device.flushed == 10


def test_a_call_that_hangs_is_not_waited_for(monkeypatch):
    device = PlayedDevice(monkeypatch)
    device.hangs = True
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    with pytest.raises(DeviceLost, match="a call did not end within 0 s"):
        device_timing({"a": lambda: None}, device=CUDA, rounds=5)
    with pytest.raises(DeviceLost, match="a call did not end"):
        first_error(lambda: None, CUDA)


def test_an_error_is_said_in_a_line_unless_the_device_is_lost(monkeypatch):
    device = PlayedDevice(monkeypatch)

    def broken():
        raise RuntimeError("out of resource: shared memory, Required: 300000\nHardware limit: 232448")

    assert first_error(lambda: None, CUDA) is None
    assert first_error(broken, CUDA) == "RuntimeError: out of resource: shared memory, Required: 300000"
    device.dead = True
    with pytest.raises(DeviceLost, match="RuntimeError: out of resource"):
        first_error(broken, CUDA)


def test_on_a_cpu_the_host_is_asked():
    assert device_timing({"a": lambda: None}, device=CPU, rounds=5)["a"].median < 1e-2
    assert first_error(lambda: 1 / 0, CPU) == "ZeroDivisionError: division by zero"
    with pytest.raises(ValueError, match="device_timing: want cold calls on a CUDA device, got cpu"):
        device_timing({"a": lambda: None}, device=CPU, cold=True)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_wants_rounds(device):
    with pytest.raises(ValueError, match="want rounds >= 5, got 4"):
        device_timing({"a": lambda: None}, device=device, rounds=4)


def test_ceilings_are_measured():
    # of a CPU, which has all of these products too
    found = measured_gpu(CPU, copied=2**20, size=64, rounds=5)
    assert set(found.flops) == {torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn}
    assert all(rate > 0 for rate in found.flops.values()) and found.memory_bandwidth > 0
    assert found.name == "cpu (measured)"
