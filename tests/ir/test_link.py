"""Rows of links, and times of collectives held against hand-computed and published figures."""

import math
from collections.abc import Callable

import pytest

from deepfuse.ir.link import (
    INFINIBAND_400,
    LINKS,
    NVLINK_H800,
    Link,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    all_to_allv_seconds,
    reduce_scatter_seconds,
)

LINK = Link(name="x", bandwidth=10.0, latency=2.0)
EQUAL = [all_to_all_seconds, all_gather_seconds, reduce_scatter_seconds, all_reduce_seconds]


def test_rows_are_found_by_their_names() -> None:
    assert all(name == link.name for name, link in LINKS.items())
    # 400 Gbit/s an adapter, one for each GPU; NVLink of H800 has four times that
    assert INFINIBAND_400.bandwidth == 400e9 / 8 and NVLINK_H800.bandwidth == 4 * INFINIBAND_400.bandwidth


def test_a_message_pays_for_its_latency_and_its_bytes() -> None:
    assert LINK.seconds(0) == 2.0
    assert LINK.seconds(30) == 5.0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    # of 40 bytes 30 travel, in 3 s; 1, 3, 3 and 6 messages follow each other, and the last sends twice the bytes
    [(all_to_all_seconds, 5.0), (all_gather_seconds, 9.0), (reduce_scatter_seconds, 9.0), (all_reduce_seconds, 18.0)],
)
def test_collectives_of_four_ranks(seconds: Callable[[Link, float, int], float], expected: float) -> None:
    assert seconds(LINK, 40, 4) == expected


@pytest.mark.parametrize("seconds", EQUAL)
def test_one_rank_alone_waits_for_nobody(seconds: Callable[[Link, float, int], float]) -> None:
    assert seconds(LINK, 1e9, 1) == 0.0


@pytest.mark.parametrize("seconds", EQUAL)
@pytest.mark.parametrize(("size", "ranks"), [(1.0, 0), (-1.0, 2)])
def test_what_is_no_collective_is_refused(
    seconds: Callable[[Link, float, int], float], size: float, ranks: int
) -> None:
    with pytest.raises(ValueError, match="want ranks >= 1 and bytes >= 0, got"):
        seconds(LINK, size, ranks)


def test_uneven_sizes_wait_for_the_busiest_rank() -> None:
    # rank 2 receives 30 + 40 bytes, more than anybody sends; what a rank keeps does not travel
    assert all_to_allv_seconds(LINK, [[1000, 0, 30], [0, 0, 40], [10, 0, 5]]) == 2.0 + 7.0
    # rank 0 sends 20 + 30
    assert all_to_allv_seconds(LINK, [[0, 20, 30], [1, 0, 0], [0, 0, 0]]) == 2.0 + 5.0
    assert all_to_allv_seconds(LINK, [[7]]) == all_to_allv_seconds(LINK, []) == 0.0


def test_even_sizes_are_a_case_of_uneven_ones() -> None:
    assert all_to_allv_seconds(LINK, [[10.0] * 4] * 4) == all_to_all_seconds(LINK, 40, 4)


def test_sizes_that_are_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match=r"want sizes\[i\]\[j\] of 2 ranks, got rows of \[2, 1\]"):
        all_to_allv_seconds(LINK, [[0, 1], [1]])


def test_bytes_on_the_wire_of_a_decode_step_as_published() -> None:
    # Insights into DeepSeek-V3, section 2.3.2: 32 tokens to 9 experts at width 7168 (written 7K, computed as 7000), FP8
    # there and bfloat16 back over 50 GB/s, is 120.96 us. Ranks without end, so that nothing stays
    wire = Link(name="wire", bandwidth=50e9, latency=0.0)
    there, back = (all_to_all_seconds(wire, width * 32 * 9 * 7000, 10**9) for width in (1, 2))
    assert there + back == pytest.approx(120.96e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("bandwidth", "latency"), [(0.0, 0.0), (-1.0, 0.0), (math.inf, 0.0), (1.0, -1e-6), (math.nan, 0)]
)
def test_a_link_that_cannot_be_is_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(ValueError, match=r"link y: want a bandwidth > 0 in bytes/s and a latency >= 0 in s"):
        Link(name="y", bandwidth=bandwidth, latency=latency)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"^link z: want a share of the device >= 0 and below 1, got {share}$"):
        Link(name="z", bandwidth=1.0, latency=0.0, share=share)
