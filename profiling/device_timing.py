"""Time that a device takes for a call, between two events, with what a call finds in its caches chosen.

    sleep | flush | begin | call | end

The calls wait behind a sleeping kernel until the host has launched all of them: launching costs nothing then. Where a call
itself waits for the device, as a reference that reads lengths does, its time is that of the host as well.
"""

import time
from collections.abc import Callable, Mapping

import torch

from deepfuse.profiling.timing import Timing, interleaved, summary

FLUSHED_BYTES = 256 * 2**20
"""Written before a cold call: five times the L2 of an H100."""
SLEEP_CYCLES = 2_000_000
"""A millisecond, in which the host gets ahead."""
LONGEST = 30.0
"""Seconds that a single call may take on the device: beyond them it hangs."""


class DeviceLost(RuntimeError):
    """A kernel hangs or has faulted: nothing runs on this device any more, in this process."""


def device_timing(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    cold: bool = False,
    rounds: int = 20,
) -> dict[str, Timing]:
    """Seconds that each alternative takes on the device, one after the other in each round.

    Args:
        device: on a CPU it is :func:`~deepfuse.profiling.timing.interleaved`, and always warm.
        cold: whether the L2 cache holds nothing of the operands before a call.
        rounds: at least 5.

    Raises:
        ValueError: fewer rounds, or ``cold`` on a CPU.
        DeviceLost: a call did not end.
    """
    if device.type != "cuda":
        if cold:
            raise ValueError(f"device_timing: want cold calls on a CUDA device, got {device}")
        return interleaved(alternatives, rounds=rounds, warmup=1)
    if rounds < 5:
        raise ValueError(f"device_timing: want rounds >= 5, got {rounds}")
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if cold else None
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for fn in alternatives.values():
        fn()
    for _ in range(rounds):
        for name, fn in alternatives.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            if flushed is not None:
                flushed.zero_()
            begin.record()
            fn()
            end.record()
            _wait(end)
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: summary(values) for name, values in seconds.items()}


def first_error(fn: Callable[[], object], device: torch.device) -> str | None:
    """Call it once, to its end on the device: what it raised, in a line, or ``None``.

    Raises:
        DeviceLost: after its error nothing runs any more, or it did not end.
    """
    try:
        fn()
        if device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
            _wait(done)
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a kernel, its compiler or a peer raises
        said = one_line(error)
        if device.type == "cuda":
            _check_alive(said)
        return said
    return None


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _check_alive(said: str) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(said) from error


def _wait(event: torch.cuda.Event) -> None:
    """``event.synchronize()``, which would wait for a kernel that hangs for ever."""
    given_up = time.monotonic() + LONGEST
    while not event.query():
        if time.monotonic() > given_up:
            raise DeviceLost(f"a call did not end within {LONGEST:.0f} s")
