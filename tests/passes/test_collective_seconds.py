"""How long each kind of collective holds the link, and what that does to a schedule."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.ir.device import CPU
from deepfuse.ir.link import Link
from deepfuse.ir.private import collectives as c10d
from deepfuse.passes.balanced_sizes import BalancedSizes
from deepfuse.passes.collective_seconds import collective_of, collective_seconds
from deepfuse.passes.graph_tasks import graph_tasks
from deepfuse.passes.overlap_schedule import Task, play, schedule
from graphs import trace

LINK = Link(name="test", bandwidth=10.0, latency=2.0)
RANKS, X = 4, torch.zeros(8, 5)
"""160 bytes."""


@pytest.fixture(scope="module", autouse=True)
def four_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def group():
    return dist.group.WORLD.group_name


def seconds(fn, *args):
    """Of each collective of a graph."""
    graph = trace(fn, *args).graph
    found = (collective_seconds(node, BalancedSizes(graph, 1), LINK) for node in graph.nodes)
    return [s for s in found if s is not None]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        # of 160 bytes 120 leave; one message, three in turn, three and three
        (lambda x: c10d.all_to_all_single(x, [2] * 4, [2] * 4, group()), 2 + 12),
        (lambda x: c10d.reduce_scatter_tensor(x, "sum", RANKS, group()), 3 * 2 + 12),
        (lambda x: c10d.all_reduce(x, "sum", group()), 6 * 2 + 24),
        # 640 in the end, of which 160 were there
        (lambda x: c10d.all_gather_into_tensor(x, RANKS, group()), 3 * 2 + 48),
        # of which no formula is known: one message
        (lambda x: c10d.broadcast(x, 0, group()), 2 + 16),
    ],
)
def test_each_kind_by_hand(start, expected):
    assert seconds(lambda x: c10d.wait_tensor(start(x)), X) == [pytest.approx(expected)]


def test_several_tensors_are_one_collective():
    def fn(x, y):
        # of a list; waits are for its parts
        gathered = c10d.all_gather_into_tensor_coalesced([x, y], RANKS, group())
        return [c10d.wait_tensor(part) for part in gathered]

    gm = trace(fn, X, X)
    assert seconds(fn, X, X) == [pytest.approx(3 * 2 + 96)]
    waits = [node for node in gm.graph.nodes if "wait_tensor" in str(node.target)]
    starts = {collective_of(node) for node in waits}
    assert len(waits) == 2 and [node.target for node in starts] == [c10d.all_gather_into_tensor_coalesced.default]


def test_a_graph_waits_for_all_of_them():
    def fn(x, w):
        summed = c10d.wait_tensor(c10d.all_reduce(x, "sum", group()))
        there = c10d.wait_tensor(c10d.all_to_all_single(summed, [2] * 4, [2] * 4, group()))
        return there @ w

    graph = trace(fn, X, torch.zeros(5, 3)).graph
    tasks = graph_tasks(graph, BalancedSizes(graph, 1), CPU, LINK).tasks
    played = play(tasks, range(len(tasks)))
    compute = sum(task.seconds for task in tasks)
    assert played.seconds == pytest.approx(36 + 14 + compute)
    # of the one that can be moved
    assert list(played.exposed.values()) == [pytest.approx(14)]


def test_a_link_that_is_held_lets_nothing_else_through():
    # a sum of 5 s that nobody reads; a message of 3 s behind it, work of 4 s, the wait
    tasks = [Task(held=5.0), Task(link_seconds=3.0), Task(seconds=4.0), Task(start=1, after=(1,))]
    played = play(tasks, range(4))
    assert played.seconds == 8 and played.exposed == {1: 4}


def test_a_schedule_fills_the_wait_for_what_holds_the_link():
    # a weight is gathered in 4 s, a message waits for it; 4 s of other work fit there
    tasks = [
        Task(held=4.0),
        Task(start=0, after=(0,)),
        Task(link_seconds=1.0, after=(1,)),
        Task(start=2, after=(2,)),
        Task(seconds=4.0),
    ]
    order = schedule(tasks, [2], 2, 4.0)
    assert play(tasks, order).seconds == pytest.approx(5) and order.index(4) < order.index(1)


def test_flops_of_what_torch_has_formulas_for():
    x, weight = torch.zeros(1, 16, 18, 18), torch.zeros(32, 16, 3, 3)
    graph = trace(
        lambda x, w: torch.ops.aten.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), x, weight
    ).graph
    (task,) = graph_tasks(graph, BalancedSizes(graph, 1), CPU, LINK).tasks
    # 16 x 16 results of 32 channels, each of 16 x 3 x 3 products; their bytes take a fifth of that
    flops = 2 * 16 * 16 * 32 * 16 * 3 * 3
    assert task.seconds == pytest.approx(flops / CPU.flops[torch.float32] + CPU.launch_seconds)
