"""What the clocks in a graph's code read: the host's time on a CPU; on a GPU events, as kernels run after their launch.

    host     wait | zero, sleep, launch launch launch          | wait, read
    device          zero | sleep ............ | kernel kernel kernel

A step waits behind a sleeping kernel until the host has launched all of it. So kernels follow one another as in the replay
of a CUDA graph, and a span is the time of a kernel and of the events around it, not that of Python.
"""

import time
from typing import Any, Protocol

import torch

CYCLES_A_SECOND = 2.5e9
"""Of a sleep: more than any GPU's clock has, so that it is never too short."""
LONGEST_SLEEP = 0.2
"""Seconds. A host that takes longer to launch a step is seen as gaps between its kernels."""


class Clock(Protocol):
    """Reads points in time; what they were in nanoseconds is known after :meth:`finish`."""

    on_device: bool

    def start(self) -> None: ...

    def now(self) -> Any: ...

    def finish(self) -> None: ...

    def nanoseconds(self, point: Any) -> int:
        """On the scale of ``time.perf_counter_ns``."""


class HostClock:
    """The host's own."""

    on_device = False
    now = staticmethod(time.perf_counter_ns)

    def start(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def nanoseconds(self, point: int) -> int:
        return point


class EventClock:
    """Events of a CUDA device, on the stream that is current where they are asked for."""

    on_device = True

    def __init__(self, device: torch.device):
        self.device = device
        self._zero = self._event()
        self._events: list[Any] = []
        self._used = 0
        self._origin = 0
        self._launching = 0.0

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        self._used = 0
        self._origin = time.perf_counter_ns()
        self._zero.record()
        if self._launching:
            torch.cuda._sleep(round(min(self._launching, LONGEST_SLEEP) * CYCLES_A_SECOND))

    def now(self) -> Any:
        if self._used == len(self._events):
            self._events.append(self._event())
        event = self._events[self._used]
        self._used += 1
        event.record()
        return event

    def finish(self) -> None:
        # of this step, for the next one
        self._launching = (time.perf_counter_ns() - self._origin) / 1e9
        torch.cuda.synchronize(self.device)

    def nanoseconds(self, point: Any) -> int:
        return self._origin + round(self._zero.elapsed_time(point) * 1e6)

    @staticmethod
    def _event() -> Any:
        return torch.cuda.Event(enable_timing=True)


def clock_of(device: torch.device) -> Clock:
    return EventClock(device) if device.type == "cuda" else HostClock()
