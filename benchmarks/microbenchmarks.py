"""What a process reaches of products, memory and a link, beside another that does the same: what predictions are made from.

    sum of two large arrays   bytes / memory bandwidth, of which a third goes to memory that is new
    sum of two small arrays   launch
    product                   launch + flops / rate + bytes / their own bandwidth; both from all shapes together
    product and its gradients    likewise, and the gradients' bytes / a bandwidth of theirs, whose operands the product just read
    message                   latency + bytes / bandwidth
    products beside a message    what they take longer is the share of a processor that the message holds
    small messages beside products   latency + what a message waits for a processor

Shapes are generic, of no model. Of several measurements the median decides, and of two ranks the slower one.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all

PRODUCTS = (
    (16, 1024, 4096),
    (64, 2048, 2048),
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
BESIDE = "products beside a message"
"""Its time is that of both halves (:class:`Beside`)."""
PRODUCT = (1024, 1024, 1024)
"""Of the products beside a message."""
MOST = 0.95
"""Share of a processor that a message may hold: something is left, or products would not end."""
SHARE = "share of a processor that a message holds"
"""Beside the seconds of the others: what was found of each message."""
LATE = "small messages beside products"
MESSAGES_LATE = 10
"""Of a measurement: how long one waits for a processor varies more than anything else here, and times add up."""
QUICK = (128, 256, 256)
"""Of the products beside small messages: short beside what a message waits."""


def microbenchmarks(axis: Axis) -> dict[str, Callable[[], object]]:
    """By name; all in float32."""
    found: dict[str, Callable[[], object]] = {}
    for shape in PRODUCTS:
        found[_name(*shape)] = _product(*shape)
        found[_with_gradients(*shape)] = Gradients(*shape)
    for n in (MEMORY, SMALL):
        found[f"sum {n}"] = functools.partial(torch.add, torch.ones(n), torch.ones(n))
    for rows in MESSAGES:
        message, split = torch.zeros(axis.size * rows, 4), [rows] * axis.size
        found[f"message {rows}"] = functools.partial(all_to_all, message, split, split, axis)
    found[BESIDE] = Beside(_product(*PRODUCT), torch.zeros(axis.size * MESSAGES[2], 4))
    found[LATE] = Late(_product(*QUICK), axis.size)
    return found


def _product(M: int, K: int, N: int) -> Callable[[], Tensor]:
    return functools.partial(torch.mm, torch.randn(M, K), torch.randn(N, K).T)


class Gradients:
    """A product ``x @ w.T``, and behind it both of its gradients."""

    def __init__(self, M: int, K: int, N: int):
        self.x, self.w, self.out = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x @ self.w.T, self.out @ self.w, self.out.T @ self.x


class Late:
    """Small messages, one after the other, with products until each is there."""

    def __init__(self, product: Callable[[], object], ranks: int):
        self.product = product
        self.message = torch.zeros(ranks * MESSAGES[0], 4)
        self.received = torch.empty_like(self.message)

    def __call__(self) -> None:
        for _ in range(MESSAGES_LATE):
            sent = dist.all_to_all_single(self.received, self.message, async_op=True)
            assert sent is not None
            while not sent.is_completed():
                self.product()
            sent.wait()


class Beside:
    """Products from when a message is sent until it is there, and as many behind it; ``shares``: of each call, what the former
    took longer, of their time. A product that is timed by itself finds other memory in the caches, and is slower by as much."""

    def __init__(self, product: Callable[[], object], message: Tensor):
        self.product, self.message, self.received = product, message, torch.empty_like(message)
        self.shares: list[float] = []

    def __call__(self) -> None:
        began = time.perf_counter()
        sent = dist.all_to_all_single(self.received, self.message, async_op=True)
        assert sent is not None
        count = 0
        while not sent.is_completed():
            self.product()
            count += 1
        with_it = time.perf_counter() - began
        sent.wait()
        began = time.perf_counter()
        for _ in range(count):
            self.product()
        self.shares.append(1 - (time.perf_counter() - began) / with_it)


def rates(seconds: Mapping[str, float], share: float, ranks: int) -> dict[str, Any]:
    """What ``deepfuse simulate --calibration`` takes, from the median of each microbenchmark.

    Args:
        share: of a processor, that a message holds.

    Raises:
        ValueError: times that no positive rate explains: the machine was not quiet.
    """
    launch, latency = seconds[f"sum {SMALL}"], seconds[f"message {MESSAGES[0]}"]
    byte = (seconds[f"sum {MEMORY}"] - launch) / (12.0 * MEMORY)
    flop, operand, of_gradient = _least_squares(_measured(seconds, launch))
    sent = statistics.median(
        ranks / (ranks - 1) * (seconds[f"message {rows}"] - latency) / (16.0 * rows * ranks) for rows in MESSAGES[1:]
    )
    late = max(seconds[LATE] / MESSAGES_LATE - latency, 0.0)
    if min(byte, flop, operand, of_gradient, sent) <= 0:
        raise ValueError(f"microbenchmarks: want times that grow with the work, got {dict(seconds)}; measure again")
    return {
        "device": {"flops": {"float32": 1 / flop}, "memory_bandwidth": 1 / byte, "launch_seconds": launch},
        "products": {"bandwidth": 1 / operand, "gradient_bandwidth": 1 / of_gradient},
        "network": {"bandwidth": 1 / sent, "latency": latency},
        # over the loopback a message is the processor's own work, and may take all of it
        "exchange": {"share": min(max(share, 0.0), MOST), "latency": late},
    }


def _name(M: int, K: int, N: int) -> str:
    return f"product {M} {K} {N}"


def _work(M: int, K: int, N: int) -> tuple[float, float]:
    """FLOPs and bytes."""
    return 2.0 * M * K * N, 4.0 * (M * K + K * N + M * N)


def _with_gradients(M: int, K: int, N: int) -> str:
    return f"{_name(M, K, N)} and its gradients"


def _measured(seconds: Mapping[str, float], launch: float) -> Iterator[tuple[float, ...]]:
    """FLOPs, bytes of products, bytes of gradients; and the seconds of all that."""
    for shape in PRODUCTS:
        flops, size = _work(*shape)
        yield flops, size, 0.0, seconds[_name(*shape)] - launch
        # each of the two gradients has the sizes of the product
        yield 3 * flops, size, 2 * size, seconds[_with_gradients(*shape)] - 3 * launch


def _least_squares(measured: Iterable[tuple[float, ...]]) -> list[float]:
    """Seconds for a unit of each kind of work: what is off least, by the squares of shares of each time."""
    # of time = a x + b y + ..., divided by time: 1 = a (x / time) + b (y / time) + ...
    scaled = torch.tensor([[x / seconds for x in work] for *work, seconds in measured], dtype=torch.float64)
    found = torch.linalg.lstsq(scaled, torch.ones(len(scaled), 1, dtype=torch.float64)).solution
    return [float(x) for x in found[:, 0]]
