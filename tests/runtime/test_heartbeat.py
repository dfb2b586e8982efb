"""What one process knows of another, whose beats the test writes."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.runtime.blame import Beat
from deepfuse.runtime.heartbeat import Heartbeat, of_a_collective


@pytest.fixture
def store():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.HashStore()
    dist.destroy_process_group()


def test_who_failed_and_goes_on_is_no_longer_a_fault(store):
    beats = dist.PrefixStore(f"deepfuse/beats{Heartbeat.made + 1}", store)
    count = 0

    def until(wanted, end):
        nonlocal count
        limit = time.monotonic() + 20
        while heart is None or heart.fault() != wanted:
            count += 1
            beats.set("1", Beat(count=count, end=end).write())
            if heart is None:
                return
            assert time.monotonic() < limit
            time.sleep(0.02)

    heart = None
    until(False, "")
    heart = Heartbeat(30.0, store)
    try:
        beats.set("fault", "")
        until(True, "failed")
        beats.delete_key("fault")  # its error was caught
        until(False, "")
    finally:
        heart.stop()


def test_every_error_of_a_wait_that_is_too_long_is_a_collectives():
    store, groups = dist.HashStore(), [None, None]

    def join(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=1))

    other = threading.Thread(target=join, args=(1,))
    other.start()
    join(0)
    other.join()
    # rank 1 takes part in neither, and of two in flight the first ends the second
    flights = [groups[0].allreduce([torch.ones(8)]) for _ in range(2)]
    for flight in reversed(flights):
        with pytest.raises(RuntimeError) as error:
            flight.wait()
        assert of_a_collective(error.value), error.value
