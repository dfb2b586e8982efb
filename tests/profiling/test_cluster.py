"""Rates that programs reach, where tokens go, and exchanges held against published ones."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepfuse.blocks.config import Config
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.cost import Cost
from deepfuse.ir.device import CPU, H800
from deepfuse.ir.link import INFINIBAND_400, NVLINK_H800, Link
from deepfuse.profiling.cluster import Cluster, places, sustained, sustained_link

V3 = PRESETS["v3-671b"]()
CLUSTER = Cluster(
    device=sustained(H800),
    gpus_per_node=8,
    nvlink=sustained_link(NVLINK_H800),
    network=sustained_link(INFINIBAND_400),
)
PLAIN = Cluster(
    device=CPU,
    gpus_per_node=4,
    nvlink=Link(name="near", bandwidth=100.0, latency=1.0),
    network=Link(name="far", bandwidth=10.0, latency=2.0),
)
FP8_ROW, BF16_ROW = 7168 + 4 * 56, 2 * 7168
"""Bytes of a row: FP8 with a scale for 128 numbers."""


def small(n_group: int, topk_group: int, K: int) -> Config:
    return replace(
        PRESETS["v3-tiny"](), n_routed_experts=12, n_group=n_group, topk_group=topk_group, num_experts_per_tok=K
    )


# a part holds whole groups, or lies in one; others are rounded to whole groups
@pytest.mark.parametrize(
    ("n_group", "topk_group", "K", "parts"),
    [(1, 1, 3, parts) for parts in (1, 2, 3, 4, 6, 12)]
    + [(3, 2, 3, parts) for parts in (1, 3, 6, 12)]
    + [(6, 2, 4, parts) for parts in (1, 2, 3, 6, 12)]
    + [(4, 2, 5, parts) for parts in (1, 2, 4, 12)],
)
def test_places_of_a_token_are_those_of_all_its_choices(n_group: int, topk_group: int, K: int, parts: int) -> None:
    config = small(n_group, topk_group, K)
    of_group, of_part = 12 // n_group, 12 // parts
    seen = []
    for groups in itertools.combinations(range(n_group), topk_group):
        experts = [e for e in range(12) if e // of_group in groups]
        seen += [len({e // of_part for e in chosen}) for chosen in itertools.combinations(experts, K)]
    assert places(config, parts) == pytest.approx(sum(seen) / len(seen), rel=1e-12)


def test_exchange_within_and_between_nodes() -> None:
    config = small(1, 1, 3)
    # 10 tokens of 2 bytes to 3 experts; of 8 ranks 3 are on the node and 4 are not: 22.5 and 30 bytes
    assert PLAIN.exchange(config, 10, 2, 8, "direct") == pytest.approx(2 + 60 * 4 / 8 / 10)
    # on one node, 3 of 4 rows leave their rank
    assert PLAIN.exchange(config, 10, 2, 4, "direct") == pytest.approx(1 + 60 * 3 / 4 / 100)
    # once to the other node, and from there to its ranks
    between = places(config, 2) / 2 * 20 / 10
    assert PLAIN.exchange(config, 10, 2, 8, "node_limited") == pytest.approx(3 + between)
    assert PLAIN.exchange(config, 10, 2, 1, "direct") == 0


def test_ranks_of_several_gpus_fill_a_node_sooner() -> None:
    config = small(1, 1, 3)
    # with two GPUs a rank, two ranks share a node: one of four is near, two are far
    assert PLAIN.exchange(config, 10, 2, 4, "direct", gpus_per_rank=2) == pytest.approx(2 + 60 * 2 / 4 / 10)


def test_low_latency_exchange_as_published() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    table = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    rows = [tuple(map(int, row)) for row in table]
    assert [row[0] for row in rows] == [8, 16, 32, 64, 128, 256]
    for ranks, *figures in rows:
        found = [1e6 * CLUSTER.exchange(V3, 128, row, ranks, "direct") for row in (FP8_ROW, BF16_ROW)]
        assert [round(us) for us in found] == figures[1::2]
        # no factor is fitted to these; what the text says of the differences, over the network and within a node
        differences = [us / published - 1 for us, published in zip(found, figures[::2], strict=True)]
        most = {8: 0.42, 16: 0.17}.get(ranks, 0.061)
        assert max(map(abs, differences)) < most + 0.005


def test_rows_of_vendors_are_not_what_programs_reach() -> None:
    assert CLUSTER.device.flops[torch.bfloat16] == pytest.approx(660e12, rel=0.01)
    assert CLUSTER.nvlink.bandwidth == 160e9 and CLUSTER.network.bandwidth == 40e9
    assert sustained(CPU) is CPU


def test_an_op_takes_its_arithmetic_its_bytes_and_its_launches() -> None:
    def seconds(op: str, flops: float, size: float, launches: float = 1.0) -> float:
        return PLAIN.seconds(op, Cost(flops=flops, bytes=size), torch.float32, launches)

    assert seconds("linear", 100e9, 40e9) == pytest.approx(1 + 2 + CPU.launch_seconds)
    assert seconds("loops", 0, 20e9, 3) == pytest.approx(1 + 3 * CPU.launch_seconds)
    # attention reads while it computes
    assert seconds("mla_decode", 100e9, 40e9) == pytest.approx(2 + CPU.launch_seconds)
    with pytest.raises(ValueError, match=r"cpu: want a rate for torch.float8_e4m3fn, got those of \[torch.float32"):
        PLAIN.seconds("fp8_matmul", Cost(flops=1, bytes=1), torch.float8_e4m3fn)


def test_attention_reaches_what_was_published_of_it() -> None:
    # 572 TFLOP/s of 4096 tokens, and 2.06 TFLOP of a gradient in 4.64 ms; rates are rounded to two digits
    forward = CLUSTER.seconds("mla_attention", Cost(572e12, 0), torch.bfloat16)
    backward = CLUSTER.seconds("mla_attention_backward", Cost(2.06e12, 0), torch.bfloat16)
    assert forward == pytest.approx(1, rel=0.01) and backward == pytest.approx(4.64e-3, rel=0.01)


DEEP_GEMM = """
1 64 2112 7168 206, 1 64 24576 1536 289, 1 64 32768 512 219, 1 64 7168 16384 336, 1 64 4096 7168 287, 1 64 7168 2048 295,
1 128 2112 7168 352, 1 128 24576 1536 535, 1 128 32768 512 358, 1 128 7168 16384 645, 1 128 4096 7168 533,
1 128 7168 2048 510, 1 4096 2112 7168 1058, 1 4096 24576 1536 990, 1 4096 32768 512 590, 1 4096 7168 16384 1358,
1 4096 4096 7168 1304, 1 4096 7168 2048 1025, 4 8192 4096 7168 1297, 4 8192 7168 2048 1099, 8 4096 4096 7168 1288,
8 4096 7168 2048 1093, 1 1024 4096 7168 1233, 1 1024 7168 2048 925, 2 512 4096 7168 1040, 2 512 7168 2048 916,
4 256 4096 7168 932, 4 256 7168 2048 815
"""
"""Groups, M, N, K and TFLOP/s of FP8 products on H800: README of DeepGEMM's first version (February 2025)."""


def test_products_as_published() -> None:
    differences = {"sum": [], "larger": []}  # type: dict[str, list[float]]
    for row in DEEP_GEMM.split(","):
        groups, M, N, K, rate = map(int, row.split())
        cost = Cost(2 * groups * M * N * K, groups * (M * K + N * K + 2 * M * N))
        published = cost.flops / (rate * 1e12)
        # the published times are a kernel's own
        found = {op: CLUSTER.seconds(op, cost, torch.float8_e4m3fn, 0) for op in ("fp8_matmul", "mla_of_that_cost")}
        for name, seconds in zip(differences, found.values(), strict=True):
            differences[name].append(seconds / published - 1)
    assert len(differences["sum"]) == 28
    mean = {name: sum(values) / 28 for name, values in differences.items()}
    # as the text of Cluster.seconds has it; no factor is fitted to these
    assert mean["sum"] == pytest.approx(0.08, abs=0.005) and mean["larger"] == pytest.approx(-0.22, abs=0.005)
    assert max(map(abs, differences["sum"])) < 0.40


def test_what_an_exchange_takes_from_what_runs_beside_it() -> None:
    assert (CLUSTER.busy(decode=False), CLUSTER.busy(decode=True)) == (20 / 132, 0)
    assert PLAIN.busy(decode=False) == 0
    assert replace(PLAIN, exchange_share=0.1).busy(decode=True) == 0.1


def test_sums_go_through_nodes_first() -> None:
    # near: 2 * 3 messages and 2 * 3/4 of 80 bytes; far: 2 messages and 2 * 1/2 of 20
    assert PLAIN.all_reduce(80, 8) == pytest.approx((6 + 1.2) + (2 * 2 + 2.0))
    assert PLAIN.all_reduce(80, 2) == pytest.approx(2 + 0.8)
    assert PLAIN.all_reduce(80, 1) == 0


def test_a_node_without_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster: want gpus_per_node >= 1, got 0"):
        replace(PLAIN, gpus_per_node=0)


@pytest.mark.parametrize(
    ("op", "times"),
    [
        ("linear", 2),
        ("linear_backward", 2),
        ("grouped_matmul_wgrad", 2),
        ("mm", 2),
        ("swiglu", 1),
        ("loops", 1),
        ("mla_attention", 1),
    ],
)
def test_products_may_move_their_operands_at_a_rate_of_their_own(op, times):
    full = PLAIN.device.memory_bandwidth
    cost, dtype = Cost(0, 10**9), torch.bfloat16
    slow = replace(PLAIN, product_bandwidth=full / 2)
    assert slow.seconds(op, cost, dtype, 0) == pytest.approx(10**9 * times / full)
    assert PLAIN.seconds(op, cost, dtype, 0) == pytest.approx(10**9 / full)
    # and those of gradients at another one
    quick = replace(slow, gradient_bandwidth=full)
    assert quick.seconds(op, cost, dtype, 0) == slow.seconds(op, cost, dtype, 0)
    assert quick.seconds(op, cost, dtype, 0, backward=True) == PLAIN.seconds(op, cost, dtype, 0)
    assert slow.seconds(op, cost, dtype, 0, backward=True) == slow.seconds(op, cost, dtype, 0)
