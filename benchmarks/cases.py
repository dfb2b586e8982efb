"""Cases of the suites ``ops`` and ``gpu``: what is measured, its work, and how a failure of one leaves the others be.

A case is made when its turn comes and is forgotten afterwards, so that memory holds one at a time.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost
from deepfuse.ir.device import CPU, Device, measured_cpu
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import Op
from deepfuse.ir.provider import REFERENCE, Provider
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.device_timing import DeviceLost, device_timing, first_error, one_line
from deepfuse.profiling.measured_gpu import measured_gpu
from deepfuse.profiling.timing import Timing

ROUNDS = 20
LONGEST_SECONDS = 0.5
"""For the rounds of a case, beyond the least number of them."""
SPARE_SECONDS = 5.0
"""Of the budget, below which no further case begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One case, made.

    Attributes:
        alternatives: by name; the first is the one that others are compared with.
        cost: of a call.
        dtype: of the operands: whose arithmetic bounds it.
        facts: of the row.
    """

    alternatives: Mapping[str, Callable[[], object]]
    cost: Cost
    dtype: torch.dtype
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A name, and how the case is made."""

    name: str
    make: Callable[[], Work]


T = TypeVar("T")
Part = tuple[str, float, Callable[[Bench], None]]
"""Name, seconds that it takes, generously, and what it does."""


def run_parts(bench: Bench, parts: Iterable[Part]) -> None:
    """The parts of a suite in their order: one that raises is left out with its error, the others go on.

    What follows the loss of the device is left out with the reason; ``--only`` runs it in another process.
    """
    lost = ""
    for name, seconds, part in parts:
        if not bench.wants(name, seconds):
            continue
        if lost:
            bench.leave_out(name, lost)
            continue
        try:
            part(bench)
        except DeviceLost as error:
            bench.leave_out(name, one_line(error))
            lost = f"the device was lost in {name}"
        except Exception as error:  # noqa: BLE001 - of whatever was to be measured
            bench.leave_out(name, one_line(error))
        if bench.torch_device.type == "cuda" and not lost:
            # models hold themselves by their graphs
            gc.collect()
            torch.cuda.empty_cache()


def measure(
    bench: Bench,
    cases: Iterable[Case],
    limits: Device,
    *,
    rounds: int = ROUNDS,
    temperatures: Sequence[str] | None = None,
) -> None:
    """A row for each case and temperature: times, and what they are of the device's limits.

    Args:
        rounds: of each case; fewer where they would take long.
        temperatures: ``cold`` and ``warm``: what the level-2 cache holds; on a CPU ``warm`` alone, by default.
    """
    device = bench.torch_device
    if temperatures is None:
        temperatures = ("cold", "warm") if device.type == "cuda" else ("warm",)
    for case in cases:
        if bench.seconds_left < SPARE_SECONDS:
            bench.leave_out(case.name, "the budget is spent")
            continue
        work, error = attempt(case.make, device)
        if work is None:
            bench.leave_out(case.name, error)
            continue
        able = dict(_able(bench, case.name, work, device))
        times = _rounds(able, rounds, device)
        for temperature in temperatures if able else ():
            name = case.name if device.type == "cpu" else f"{case.name}, {temperature}"
            found = device_timing(able, device=device, cold=temperature == "cold", rounds=times)
            bench.row(name, found, unit="us", **facts(work, found, limits))


def facts(work: Work, found: Mapping[str, Timing], limits: Device) -> dict[str, Any]:
    """What a row says beside its times, of each alternative: GB/s and TFLOP/s, and the share of what bounds it."""
    flops, size = work.cost.flops, work.cost.bytes
    memory = size / limits.memory_bandwidth
    # what is not multiplied in its own dtype is computed in float32
    peak = limits.flops.get(work.dtype, limits.flops[torch.float32])
    bound = max(memory, flops / peak)
    return {
        **work.facts,
        "flops": flops,
        "bytes": size,
        "ceiling": {"GB/s": _short(limits.memory_bandwidth / 1e9), "TFLOP/s": _short(peak / 1e12)},
        "limit": "memory" if bound == memory else "arithmetic",
        "GB/s": {name: _short(size / t.median / 1e9) for name, t in found.items()},
        "TFLOP/s": {name: _short(flops / t.median / 1e12) for name, t in found.items()},
        "share of limit": {name: _short(bound / t.median) for name, t in found.items()},
    }


class Ceilings:
    """What the device reaches, measured once, when it is first asked for.

    Args:
        sizes: of :func:`~deepfuse.profiling.measured_gpu.measured_gpu`.
    """

    def __init__(self, device: torch.device, **sizes: int):
        self.device, self.sizes = device, sizes

    @cached_property
    def limits(self) -> Device:
        return measured_cpu() if self.device.type == "cpu" else measured_gpu(self.device, **self.sizes)

    def part(self) -> Part:
        """Two rows; first, since all others are shares of it."""
        return "ceilings", 10, self._rows

    def _rows(self, bench: Bench) -> None:
        found = self.limits
        # of a CPU some rates are nominal
        rates = {dtype: rate for dtype, rate in found.flops.items() if rate != CPU.flops.get(dtype)}
        row = {str(dtype).removeprefix("torch."): _short(rate / 1e12) for dtype, rate in rates.items()}
        bench.row("ceiling: matrix products", row, unit="TFLOP/s", better="higher")
        how = "read" if self.device.type == "cpu" else "copy"
        bench.row("ceiling: memory", {how: _short(found.memory_bandwidth / 1e9)}, unit="GB/s", better="higher")


def providers(op: Op, args: tuple[Any, ...], device: torch.device) -> dict[str, Callable[[], Any]]:
    """Every provider of the op that takes these arguments there, but the reference and text for Inductor; Triton first.

    In Triton's interpreter its kernels run on a CPU too.
    """

    def runs(provider: Provider) -> bool:
        if provider.name == "triton" and device.type == "cpu":
            return interpreted()
        return device.type in provider.priority and provider.name != REFERENCE and not provider.inline

    able = [p for p in op.providers if runs(p) and p.supports(*args) is None]
    able.sort(key=lambda p: p.name != "triton")
    return {p.name: lambda p=p: p.fn(*args) for p in able}  # type: ignore[misc]


def first_dtype(args: Iterable[Any]) -> torch.dtype:
    """Of the first tensor."""
    return next(a.dtype for a in args if isinstance(a, Tensor))


def attempt(make: Callable[[], T], device: torch.device) -> tuple[T | None, str]:
    """What is made, or ``None`` and the error.

    Raises:
        DeviceLost: nothing can be made any more.
    """
    made: list[T] = []
    error = first_error(lambda: made.append(make()), device)
    return (made[0], "") if error is None else (None, error)


def _able(bench: Bench, name: str, work: Work, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The alternatives that come through a first call, in which kernels are compiled."""
    for label, fn in work.alternatives.items():
        error = first_error(fn, device)
        left_out = f"{name}: {label}"
        # of an earlier run of this part
        bench.results = bench.results.without_left_out(left_out)
        if error is None:
            yield label, fn
        else:
            bench.leave_out(left_out, error)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _rounds(alternatives: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> int:
    """As many as there is time for, five at least."""
    began = time.perf_counter()
    for fn in alternatives.values():
        fn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return max(min(rounds, int(LONGEST_SECONDS / (time.perf_counter() - began))), 5)


def _short(number: float) -> float:
    return float(f"{number:.4g}")
