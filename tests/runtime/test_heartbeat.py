"""What one process knows of another, whose beats the test writes."""

import time

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.runtime.blame import Beat
from deepfuse.runtime.heartbeat import Heartbeat


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
