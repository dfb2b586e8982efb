"""The link that a run measures for itself, from messages that were disturbed by other work on the machine."""

import statistics

import pytest

from benchmark_scripts import load_script

measured_rates = load_script("measured_rates")

DISTURBED = (
    0.4906, 5.0446, 2.8078, 0.5046, 4.2521, 0.293, 3.6102, 0.4765, 0.2821, 0.2057, 0.1862, 0.2032, 0.1794, 0.2066, 1.9022,
    0.3373, 0.2931, 0.3436, 1.9472, 0.1866, 3.9277, 0.1828, 0.2705, 0.1755, 0.1726, 2.8068, 1.7813, 1.3682, 3.663, 0.1602,
    0.3531, 0.3157, 0.2207, 0.2953, 0.3379, 0.4346, 0.2967, 0.3637, 0.3428, 0.2222,
)  # fmt: skip
"""Milliseconds of messages of 256 bytes, as they came, on a link of 100 MB/s both ways while other programs started; without
them 0.3."""
LARGE = (86.5933, 94.2045, 86.1697, 84.4184, 114.2828, 84.5362, 84.4453, 88.5734)
"""Likewise of 4 MiB, beside programs that computed: the link's rate makes it 84."""


def milliseconds(values):
    return [value / 1e3 for value in values]


def test_what_disturbs_some_messages_does_not_make_the_latency():
    assert statistics.median(DISTURBED[:5]) > 2.5  # what five in a row say
    link = measured_rates.link_of(milliseconds(DISTURBED), milliseconds(LARGE))
    # quartiles of undisturbed ones: 0.26 and 0.37 ms
    assert 0.26e-3 < link.latency < 0.37e-3
    # each way has half of the rate; 4 of 8 were slowed by 4% or more
    assert link.bandwidth == pytest.approx(50e6, rel=0.04)


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_one_outlier_moves_neither(outlier):
    small, large = milliseconds(DISTURBED), milliseconds(LARGE)
    before = measured_rates.link_of(small, large)
    after = measured_rates.link_of([outlier, *small[1:]], [outlier, *large[1:]])
    # to the next of the sorted values at most: 2% of the latency here, 2% of the large messages
    assert after.latency == pytest.approx(before.latency, rel=0.02)
    assert after.bandwidth == pytest.approx(before.bandwidth, rel=0.02)


def test_the_link_is_that_of_undisturbed_times():
    size, small, large = measured_rates.LARGE, 1e-3, 1e-3 + (measured_rates.LARGE - measured_rates.SMALL) / 5e7
    link = measured_rates.link_of([small] * 3, [large] * 3)
    assert link.latency == small and link.bandwidth == pytest.approx(5e7)
    assert link.seconds(size) == pytest.approx(large, rel=1e-3)


def test_times_that_do_not_grow_are_refused():
    with pytest.raises(
        ValueError, match=r"^link: want 4194304 bytes to take longer than 256, got 0.1 s and 0.2 s; measure again$"
    ):
        measured_rates.link_of([0.2], [0.1])
