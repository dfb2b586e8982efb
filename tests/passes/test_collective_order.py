"""Orders are equal where ops and groups are, whatever the groups are called."""

from deepfuse.passes.collective_order import collective_orders
from deepfuse.passes.journal import GraphEntry, Journal
from deepfuse.passes.sites import Site


def order(*calls):
    sites = [Site(i, "mlp", op, group=group, message=str(i)) for i, (op, group) in enumerate(calls)]
    return collective_orders(Journal([GraphEntry("prefill", sites=[*sites, Site(9, "mlp", "linear")])]))


def test_orders_are_told_apart():
    there = order(("all_to_all_single", "1"), ("all_reduce", "2"))
    assert list(there) == ["collectives of graph 0, prefill"] and there["collectives of graph 0, prefill"].startswith(
        "2 in"
    )
    assert order(("all_to_all_single", "7"), ("all_reduce", "3")) == there
    assert order(("all_to_all_single", "1"), ("all_reduce", "1")) != there
    assert order(("all_reduce", "2"), ("all_to_all_single", "1")) != there
    assert order() == {}
