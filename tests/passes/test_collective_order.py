"""Orders are equal where ops and groups are, whatever the groups are called; of compiled graphs, as the code has them."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all, gather_rows, sum_over
from deepfuse.ir.device import CPU
from deepfuse.passes.collective_order import collective_orders, issued, order_of
from deepfuse.passes.journal import GraphEntry, Journal
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.passes.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's Dynamo


def order(*calls, axes=None, dtype="float32"):
    sites = [Site(i, "mlp", op, group=group, message=str(i), dtype=dtype) for i, (op, group) in enumerate(calls)]
    graph = GraphEntry("prefill", collectives=issued([*sites, Site(9, "mlp", "linear")]))
    return collective_orders(Journal([graph]), axes or {})


def test_orders_are_told_apart():
    there = order(("all_to_all_single", "1"), ("all_reduce", "2"))
    assert list(there) == ["collectives of graph 0, prefill"] and there["collectives of graph 0, prefill"].startswith(
        "2 in"
    )
    assert order(("all_to_all_single", "7"), ("all_reduce", "3")) == there
    assert order(("all_to_all_single", "1"), ("all_reduce", "1")) != there
    assert order(("all_reduce", "2"), ("all_to_all_single", "1")) != there
    assert order(("all_to_all_single", "1"), ("all_reduce", "2"), dtype="bfloat16") != there
    assert order() == {}


def test_two_axes_in_the_other_order_are_told_apart():
    calls, turned = (("all_reduce", "3"), ("all_reduce", "8")), (("all_reduce", "8"), ("all_reduce", "3"))
    assert order(*calls) == order(*turned)
    axes = {"3": "expert", "8": "tensor"}
    assert order(*calls, axes=axes) != order(*turned, axes=axes)
    assert order(*turned, axes=axes) == order(*calls, axes={"8": "expert", "3": "tensor"})


@pytest.fixture
def axis():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Axis("expert", dist.group.WORLD.group_name, 2, 0)
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_each_graph_is_told_before_it_runs_also_where_inductor_has_kept_it(axis, monkeypatch, tmp_path, compiled):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(x):
        y = sum_over(all_to_all(x, [2, 2], [2, 2], axis), axis)
        return gather_rows(y, axis)

    settings = {"device": CPU, "max_seq_len": 64, "providers": {}, "link": None}
    forward = ["all_to_all_single", "all_reduce", "all_gather_into_tensor"]
    heard: list[list[str]] = []
    told = []
    for _ in range(2):
        torch._dynamo.reset()
        runner = Runner(default(), settings, meet=lambda name, calls: heard.append([op for op, _, _ in calls]))
        x = torch.ones(4, 4, requires_grad=True)
        backend = runner.inductor() if compiled else runner.backend()
        out = torch.compile(step, fullgraph=True, backend=backend)(x)
        told.append(heard.copy())  # of the backward graph as well, before it is called
        out.sum().backward()
        assert told[-1] == heard
        heard.clear()
    assert told == [[forward, ["reduce_scatter_tensor", "all_to_all_single"]]] * 2


def test_an_order_says_how_many_there_are():
    assert order_of([("all_reduce", "0", "mlp float32")], {}).startswith("1 in the order ")
