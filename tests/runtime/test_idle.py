"""Who sleeps is told from who computes, waits for a compiler, or wakes up now and then."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from deepfuse.runtime.idle import Idle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@contextmanager
def in_a_thread(work: Callable[[threading.Event], object]) -> Iterator[int]:
    """Its native number, while it works."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), daemon=True)
    thread.start()
    try:
        assert thread.native_id is not None
        yield thread.native_id
    finally:
        done.set()
        thread.join()


def idle_after(thread: int, seconds: float) -> float:
    """As a heartbeat looks at it."""
    idle, until = Idle(), time.monotonic() + seconds
    idle.seconds(thread)
    while time.monotonic() < until:
        time.sleep(0.05)
        found = idle.seconds(thread)
    return found


def compute(done: threading.Event) -> None:
    while not done.is_set():
        sum(range(10000))


def poll(done: threading.Event) -> None:
    while not done.is_set():
        time.sleep(0.02)


def compile_elsewhere(done: threading.Event) -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"])
    done.wait()
    busy.kill()
    busy.wait()


def test_who_waits_is_idle() -> None:
    with in_a_thread(lambda done: done.wait()) as thread:
        time.sleep(0.2)
        assert idle_after(thread, 0.6) > 0.5


@pytest.mark.parametrize("work", [compute, poll, compile_elsewhere])
def test_who_does_something_is_not(work: Callable[[threading.Event], object]) -> None:
    with in_a_thread(work) as thread:
        time.sleep(0.2)
        assert idle_after(thread, 0.6) < 0.4


def test_nothing_is_known_of_a_thread_that_is_not_there() -> None:
    assert Idle().seconds(-1) < 0.1
