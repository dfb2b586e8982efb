"""Clocks of a GPU, on a device that is acted: launches return at once, and what was launched runs one after the other."""

import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from deepfuse.ir.private import KERNEL, NOTED
from deepfuse.passes.sites import Site
from deepfuse.profiling import device_clock
from deepfuse.profiling import recorder as recorder_module
from deepfuse.profiling.device_clock import CYCLES_A_SECOND, LONGEST_SLEEP, EventClock, HostClock, clock_of
from deepfuse.profiling.recorder import Recorder, Recording, WholeRecorder
from deepfuse.profiling.run import Run

CUDA = torch.device("cuda")
SITES = [Site(0, "layers.0.mlp", "linear"), Site(1, "layers.0.mlp", "swiglu")]


class Device:
    """Nanoseconds of a host and of a device, moved on by what is called."""

    def __init__(self):
        self.host, self.device, self.slept = 1_000_000, 1_000_000, []

    def launch(self, ns, took=5_000):
        """A kernel of so long, whose launch takes the host 5 us."""
        self.host += took
        self.device = max(self.device, self.host) + ns

    def synchronize(self, device=None):
        self.host = self.device = max(self.host, self.device)

    def sleep(self, cycles):
        self.slept.append(cycles / CYCLES_A_SECOND)
        self.launch(round(cycles / CYCLES_A_SECOND * 1e9), took=0)

    def event(device, enable_timing):
        assert enable_timing

        class Event:
            def record(self):
                self.at = device.device = max(device.device, device.host)

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e6

        return Event()


@pytest.fixture
def device(monkeypatch):
    acted = Device()
    monkeypatch.setattr(torch.cuda, "Event", acted.event)
    monkeypatch.setattr(torch.cuda, "_sleep", acted.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", acted.synchronize)
    for module in (device_clock, recorder_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter_ns=lambda: acted.host))
    return acted


def code(*kernels):
    """A graph's code that launches kernels of so many nanoseconds, and the module it lies in; it asks the device nothing."""
    noted = [f'{NOTED} {{"number": {s.number}, "module": "{s.module}", "op": "{s.op}"}}' for s in SITES[: len(kernels)]]
    calls = [line for i, ns in enumerate(kernels) for line in (f"    {KERNEL} {i}/", f"    extern_kernels.mm({ns})")]
    lines = ["import acted", "extern_kernels = acted.kernels", *noted, "def call(args):", *calls, "    return (args,)"]
    return "\n".join(lines) + "\n"


def recorder(device, monkeypatch, tmp_path, *kernels, steps=None):
    monkeypatch.setitem(sys.modules, "acted", SimpleNamespace(kernels=SimpleNamespace(mm=device.launch)))
    path = tmp_path / "code.py"
    # text of its own: a module of the same text would be loaded once for all tests, with the device of the first
    path.write_text(f"# {tmp_path}\n{code(*kernels)}")
    module: dict = {"__name__": "code"}
    exec(compile(path.read_text(), str(path), "exec"), module)  # noqa: S102 - as Inductor loads it
    run = Run(model="m", dtype="float32", device="acted", threads=1, torch="2", date="2026-01-01")
    recording = Recording(run, warmup=2, steps=steps, clocks=ExitStack(), device=CUDA)
    return Recorder("decode_1", recording, repeat=True), lambda: module["call"]([])


def test_each_device_has_its_clock(device):
    assert isinstance(clock_of(torch.device("cpu")), HostClock) and isinstance(clock_of(CUDA), EventClock)


def test_a_kernels_time_is_the_devices_and_not_that_of_its_launch(device, monkeypatch, tmp_path):
    record, call = recorder(device, monkeypatch, tmp_path, 2_000, 700)
    record(call)
    record(call)
    recording = record.recording
    recording.finish()
    for step in recording.run.steps:
        assert [span.ended - span.began for span in step.spans] == [2_000, 700]
        # launched while the device slept: nothing between kernels, and nothing around them
        assert (step.wrapper_ns, step.guard_ns) == (0, 0)
    assert len(recording.run.steps) == 2
    assert [row.us for row in recording.run.rows("place")][:2] == [2.0, 0.7]
    first, second = recording.run.steps
    assert first.ended <= second.began
    # the sleep is as long as it took to launch both, which is known from the second call on
    assert device.slept and all(slept >= 10e-6 for slept in device.slept)


def test_without_a_lead_the_host_is_seen_between_kernels(device, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    record, call = recorder(device, monkeypatch, tmp_path, 2_000, 700)
    record(call)
    record.recording.finish()
    (step,) = record.recording.run.steps
    # a launch takes 5 us; the device waits for it, as it does not wait for the event before
    assert [span.ended - span.began for span in step.spans] == [5_000 + 2_000, 5_000 - 2_000 + 700]


def test_a_step_that_takes_long_to_launch_is_not_waited_for_forever(device):
    clock = EventClock(CUDA)
    for _ in range(2):
        clock.start()
        clock.now()
        device.launch(10, took=10**9)
        clock.finish()
    assert device.slept == [LONGEST_SLEEP]


def test_events_are_used_again(device):
    clock, points = EventClock(CUDA), []
    for _ in range(3):
        clock.start()
        points.append([clock.now() for _ in range(4)])
        clock.finish()
    assert points[0] == points[1] == points[2] and len(set(map(id, points[0]))) == 4


def test_what_is_no_graph_is_waited_for_too(device):
    run = Run(model="m", dtype="float32", device="acted", threads=1, torch="2", date="2026-01-01")
    recording = Recording(run, warmup=1, steps=1, clocks=ExitStack(), device=CUDA)
    optimizer = WholeRecorder("optimizer", recording)
    for _ in range(4):
        optimizer(lambda: device.launch(30_000))
    recording.finish()
    (step,) = run.steps
    assert step.ended - step.began >= 30_000


def test_the_hosts_clock_is_that_of_python():
    clock = HostClock()
    clock.start()
    before, now, after = time.perf_counter_ns(), clock.now(), time.perf_counter_ns()
    clock.finish()
    assert before <= clock.nanoseconds(now) <= after
