"""Whether a thread does something or only waits: what tells who compiles for long from who hangs.

A thread that is awake, or waits for a disk, does something, and so does one that has been awake since it was last looked at;
so do the processes that this one has started, as compilers. Known on Linux alone; elsewhere all are taken to do something.
"""

import contextlib
import os
import re
import time
from pathlib import Path

_STATE = re.compile(r"^State:\s+(\w)", re.MULTILINE)
_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE)


class Idle:
    """Since when a thread has done nothing."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] | None = None
        self._since = time.monotonic()

    def seconds(self, thread: int) -> float:
        """Seconds that it has done nothing, as far as it was looked at; ``thread``: its native number."""
        seen, now = _asleep(thread), time.monotonic()
        if seen is None or seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since


def _asleep(thread: int) -> tuple[int, ...] | None:
    """How often the thread and each child have gone to sleep; ``None`` where one of them does something."""
    try:
        counts = _slept(Path(f"/proc/self/task/{thread}/status"))
        for child in _children(Path("/proc/self/task")):
            with contextlib.suppress(OSError):  # it has just ended
                counts += (child, *_slept(Path(f"/proc/{child}/status")))
    except (OSError, _Awake):
        return None
    return counts


class _Awake(Exception):
    pass


def _slept(status: Path) -> tuple[int, ...]:
    text = status.read_text()
    state = _STATE.search(text)
    if state is None or state[1] in "RD":
        raise _Awake
    return tuple(map(int, _SWITCHES.findall(text)))


def _children(tasks: Path) -> list[int]:
    """Processes that a process has started, and those that these have."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(tasks):
            with contextlib.suppress(OSError):
                for child in map(int, (tasks / task / "children").read_text().split()):
                    found += [child, *_children(Path(f"/proc/{child}/task"))]
    return found
