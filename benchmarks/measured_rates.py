"""What a run's own link and processor reach, for the cost model of the passes: measured before the layers are compiled.

Something else may run on the machine meanwhile. Of five messages of 256 bytes, one behind the other, four once took 2 to 5 ms
instead of 0.3, and their median made a graph latency-bound. So there are many of what is short, spread over the time that
what is long takes: to move the median, a disturbance must last for half of it.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from microbenchmarks import MOST, Beside

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all
from deepfuse.ir.device import CPU, Device
from deepfuse.ir.link import Link

SMALL, LARGE = 256, 1 << 22
"""Bytes that a process sends to the other: one message is all latency, the other far beyond what a link takes in at once."""
ROUNDS, EACH = 8, 5
"""Of a large message or a product, and small messages before each of the former."""

Timed = Callable[[Mapping[str, Callable[[], object]], int], dict[str, list[float]]]
"""``overlap_ranks.timed``."""


def measured_link(axis: Axis, timed: Timed) -> Link:
    """Latency and bandwidth from all-to-alls of two sizes, and what products beside one lose; the same on all ranks."""
    small, large = (_exchange(size, axis) for size in (SMALL, LARGE))
    beside = Beside(functools.partial(torch.mm, *torch.randn(2, 512, 512)), torch.zeros(axis.size * LARGE // 4))
    times = timed({**{f"small {i}": small for i in range(EACH)}, "large": large, "beside": beside}, ROUNDS)
    link = link_of([seconds for i in range(EACH) for seconds in times[f"small {i}"]], times["large"])
    shares = torch.tensor(beside.shares, dtype=torch.float64)
    dist.all_reduce(shares)
    return replace(link, share=min(max(float(shares.median()) / axis.size, 0.0), MOST))


def _exchange(size: int, axis: Axis) -> Callable[[], object]:
    rows = [size // 16] * axis.size
    return functools.partial(all_to_all, torch.zeros(sum(rows), 4), rows, rows, axis)


def link_of(small: Sequence[float], large: Sequence[float]) -> Link:
    """The link whose messages of ``SMALL`` and ``LARGE`` bytes took so many seconds each.

    Raises:
        ValueError: large messages were as fast as small ones.
    """
    latency, longer = statistics.median(small), statistics.median(large)
    if longer <= latency:
        raise ValueError(
            f"link: want {LARGE} bytes to take longer than {SMALL}, got {longer} s and {latency} s; measure again"
        )
    return Link(name="measured", bandwidth=(LARGE - SMALL) / (longer - latency), latency=latency)


def measured_device(tokens: int, width: int, inner: int, timed: Timed) -> Device:
    """The rate of one product of the layer's shape, of the slower rank; the same on all ranks."""
    a, b = torch.randn(tokens, width), torch.randn(inner, width)
    seconds = statistics.median(timed({"product": functools.partial(torch.mm, a, b.T)}, ROUNDS)["product"])
    return replace(CPU, flops={**CPU.flops, torch.float32: 2 * tokens * width * inner / seconds})
