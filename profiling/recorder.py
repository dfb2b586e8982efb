"""Calls of a graph as they are recorded: found, warmed up, and then read from the clocks in its code.

The first call finds the code that it reaches, a copy of which is given clocks (:mod:`deepfuse.profiling.instrument`). Then
come ``warmup`` calls that do not count. A graph of a generation repeats its first call for that: it writes what it is given
where it is told, so that doing it twice changes nothing. A step of training changes what the next one starts from: there the
first calls are real ones, and are not recorded.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from deepfuse.passes.sites import Site
from deepfuse.profiling.device_clock import clock_of
from deepfuse.profiling.instrument import Instrumented, Readings, code_called_by, replaced, sites_in, spans_of
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Step
from deepfuse.profiling.torch_trace import TorchTraces

Reading = tuple[str, int, int, int, int, Readings, dict[str, int]]
"""What :class:`Step` has, its spans as they were read."""

CPU = torch.device("cpu")

together: ContextVar[bool] = ContextVar("together", default=False)
"""Whether all processes that a graph's collectives need are profiled with this one."""


@dataclass(slots=True)
class Recording:
    """What all graphs of a profile share.

    Attributes:
        warmup: calls of each graph that do not count, beside the first.
        steps: calls of each graph that are recorded; ``None`` for all.
        clocks: removes them from the graphs' code when it is closed.
        traces: of further calls, by torch.profiler, where a call may be repeated; ``None`` for none.
        device: that the graphs run on.
        readings: of the steps that count.
    """

    run: Run
    warmup: int
    steps: int | None
    clocks: ExitStack
    traces: TorchTraces | None = None
    device: torch.device = CPU
    readings: list[Reading] = field(default_factory=list)

    def finish(self) -> None:
        """Give the run its steps."""
        self.run.steps += map(_step, self.readings)


class Recorder:
    """A graph whose calls are recorded."""

    def __init__(self, name: str, recording: Recording, *, repeat: bool):
        """``repeat``: whether its first call may be repeated, else the first calls are not recorded."""
        self.name, self.recording, self.repeat = name, recording, repeat
        self.waiting, self.left = recording.warmup, recording.steps
        self.code: Instrumented | None = None

    def __call__(self, call: Callable[[], Any]) -> Any:
        """What ``call`` gives, which is a call of the graph."""
        if self.left == 0:
            return call()
        if self.code is None:
            result = self._with_clocks(call)
            if not self.repeat:
                return result
            for _ in range(self.waiting):
                call()
            self.waiting = 0
            if self.recording.traces is not None:
                parts = self.recording.run.parts[self.name]
                self.recording.traces.record(self.name, lambda: _step(self._read(call)[1]), parts)
        if self.waiting:
            self.waiting -= 1
            return call()
        result, reading = self._read(call)
        self.recording.readings.append(reading)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.uninstall()
        return result

    def _read(self, call: Callable[[], Any]) -> tuple[Any, Reading]:
        began = time.perf_counter_ns()
        result = call()
        ended = time.perf_counter_ns()
        code = self.code
        assert code is not None
        if code.began < began:
            raise ValueError(f"profile: want calls of {self.name} that one graph serves, got one of other shapes")
        if code.clock.on_device:
            # before and after, the host waits for the device
            began, ended = code.began, code.ended
        return result, (self.name, began, ended, code.began, code.ended, code.readings(), dict(code.sizes))

    def _with_clocks(self, call: Callable[[], Any]) -> Any:
        owner, source, result = code_called_by(call)
        groups = sorted({site.group for site in sites_in(source).values() if site.group})
        if groups and not together.get():
            # repeated by this process alone, they would wait for the others
            raise ValueError(
                f"profile: want a graph without collectives, got {self.name} with groups {', '.join(groups)}; "
                "deepfuse.profile_ranks profiles all their processes"
            )
        self.code = Instrumented(source, owner, clock_of(self.recording.device))
        self.recording.run.parts[self.name] = [
            [_part(kernel.name, own, taken_in, self.code.sites) for own, taken_in in kernel.parts]
            for kernel in self.code.kernels
        ]
        mine = self.recording.clocks.enter_context(ExitStack())
        mine.enter_context(replaced(owner, self.code))
        self.uninstall = mine.close
        return result


class WholeRecorder:
    """A part of a step that is no compiled graph: its time is one row."""

    def __init__(self, name: str, recording: Recording):
        self.name, self.recording = name, recording
        self.waiting, self.left = recording.warmup + 1, recording.steps
        self.clock = clock_of(recording.device)

    def __call__(self, call: Callable[[], Any]) -> Any:
        if self.waiting or self.left == 0:
            self.waiting = max(self.waiting - 1, 0)
            return call()
        self.clock.start()
        first = self.clock.now()
        result = call()
        last = self.clock.now()
        self.clock.finish()
        began, ended = self.clock.nanoseconds(first), self.clock.nanoseconds(last)
        self.recording.run.parts.setdefault(self.name, [])
        self.recording.readings.append((self.name, began, ended, began, ended, [], {}))
        if self.left is not None:
            self.left -= 1
        return result


def _step(reading: Reading) -> Step:
    return Step(*reading[:5], spans_of(reading[5]), reading[6])


def _part(kernel: str, own: tuple[int, ...], taken_in: tuple[int, ...], sites: dict[int, Site]) -> Part:
    return Part(kernel, tuple(sites[i] for i in own), tuple(sites[i] for i in taken_in))
