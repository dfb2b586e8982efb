"""Timing of alternatives in one run: interleaved, so that a machine's moods fall on all alike; medians, with spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one alternative.

    Attributes:
        median: of all rounds.
        low, high: first and last quartile.
    """

    median: float
    low: float
    high: float


def interleaved(alternatives: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time each alternative once a round, in turn.

    Args:
        rounds: at least 5, so that quartiles mean something.
        warmup: calls of each before the first round.
    """
    if rounds < 5:
        raise ValueError(f"interleaved: want rounds >= 5, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(warmup):
        for fn in alternatives.values():
            fn()
    for _ in range(rounds):
        for name, fn in alternatives.items():
            seconds[name].append(_once(fn))
    return {name: summary(values) for name, values in seconds.items()}


def _once(fn: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(values: list[float]) -> Timing:
    """Of at least two times of one thing, in seconds."""
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)
