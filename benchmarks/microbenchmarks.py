"""What a process reaches of products, memory and a link, beside another that does the same: what predictions are made from.

    sum of two large arrays   bytes / memory bandwidth, of which a third goes to memory that is new
    sum of two small arrays   launch
    product                   flops / rate + bytes / memory bandwidth
    message                   latency + bytes / bandwidth
    products while a message is on its way: what they take longer is the share of a processor that the message holds

Shapes are generic, of no model. Of several measurements the median decides, and of two ranks the slower one.
"""

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all

PRODUCTS = (
    (128, 1024, 2048),
    (512, 2048, 1024),
    (1024, 1024, 1024),
    (2048, 768, 6144),
    (4096, 1024, 3072),
    (1024, 6144, 768),
)
"""``[M, K] @ [K, N]``: few rows and many, results that fit into caches and that do not, short sums and long ones."""
MEMORY = 1 << 24
"""Numbers in each operand of a sum: 64 MiB, more than caches and allocators keep."""
SMALL = 16
"""Numbers of a sum that takes as long as its call."""
MESSAGES = (16, 1 << 17, 1 << 18)
"""Rows of 16 bytes to each process: one that is all latency, and others far beyond what a link takes in at once."""
BESIDE = "beside a message"
MOST = 0.95
"""Share of a processor that a message may hold: something is left, or products would not end."""
COUNT = "products beside a message"
"""Beside the seconds of the others: how many there were."""


def microbenchmarks(axis: Axis) -> dict[str, Callable[[], object]]:
    """By name; all in float32."""
    found: dict[str, Callable[[], object]] = {}
    for M, K, N in PRODUCTS:
        found[f"product {M} {K} {N}"] = functools.partial(torch.mm, torch.randn(M, K), torch.randn(N, K).T)
    for n in (MEMORY, SMALL):
        found[f"sum {n}"] = functools.partial(torch.add, torch.ones(n), torch.ones(n))
    for rows in MESSAGES:
        message, split = torch.zeros(axis.size * rows, 4), [rows] * axis.size
        found[f"message {rows}"] = functools.partial(all_to_all, message, split, split, axis)
    M, K, N = PRODUCTS[2]
    found[BESIDE] = Beside(found[f"product {M} {K} {N}"], torch.zeros(axis.size * MESSAGES[2], 4))
    return found


class Beside:
    """Products from when a message is sent until it is there; ``counts``: how many, of each call."""

    def __init__(self, product: Callable[[], object], message: Tensor):
        self.product, self.message, self.received = product, message, torch.empty_like(message)
        self.counts: list[int] = []

    def __call__(self) -> None:
        sent = dist.all_to_all_single(self.received, self.message, async_op=True)
        assert sent is not None
        count = 0
        while not sent.is_completed():
            self.product()
            count += 1
        sent.wait()
        self.counts.append(count)


def rates(seconds: Mapping[str, float], ranks: int) -> dict[str, Any]:
    """What ``deepfuse simulate --calibration`` takes, from the median of each microbenchmark.

    Raises:
        ValueError: times that no positive rate explains: the machine was not quiet.
    """
    launch, latency = seconds[f"sum {SMALL}"], seconds[f"message {MESSAGES[0]}"]
    byte = (seconds[f"sum {MEMORY}"] - launch) / (12.0 * MEMORY)
    flop = _each(
        (2.0 * M * K * N, seconds[f"product {M} {K} {N}"] - launch - byte * 4.0 * (M * K + K * N + M * N))
        for M, K, N in PRODUCTS
    )
    sent = _each(
        (16.0 * rows * ranks, ranks / (ranks - 1) * (seconds[f"message {rows}"] - latency)) for rows in MESSAGES[1:]
    )
    alone = seconds[COUNT] * seconds[f"product {' '.join(map(str, PRODUCTS[2]))}"]
    # over the loopback a message is the processor's own work, and may take all of it
    share = min(max((seconds[BESIDE] - alone) / seconds[f"message {MESSAGES[2]}"], 0.0), MOST)
    if min(byte, flop, sent) <= 0:
        raise ValueError(f"microbenchmarks: want times that grow with the work, got {dict(seconds)}; measure again")
    return {
        "device": {"flops": {"float32": 1 / flop}, "memory_bandwidth": 1 / byte, "launch_seconds": launch},
        "network": {"bandwidth": 1 / sent, "latency": latency},
        "exchange": {"share": share},
    }


def _each(pairs: Iterable[tuple[float, float]]) -> float:
    """Seconds for a unit of work: the median of what pairs of work and seconds say."""
    return statistics.median(seconds / work for work, seconds in pairs)
