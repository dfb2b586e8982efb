"""FP8 products on a GPU: every provider of ours over DeepSeek-V3's shapes, beside the same product in bfloat16.

    PYTHONPATH=src python benchmarks/fp8_products.py --json benchmarks/results/fp8_products.json

Time is that of the device, between two events: the calls wait behind a sleeping kernel, so that launching costs nothing.
Cold: a buffer larger than the L2 cache was written before each call. Each figure is a median.
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deepfuse.ir.op import Op
from deepfuse.ir.provider import REFERENCE
from deepfuse.ops.fp8_grouped_matmul import fp8_grouped_matmul
from deepfuse.ops.fp8_grouped_matmul_wgrad import fp8_grouped_matmul_wgrad
from deepfuse.ops.fp8_matmul import fp8_matmul
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.grouped_matmul_wgrad import grouped_matmul_wgrad
from deepfuse.ops.quantize import quantize

WEIGHTS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168))
"""N and K."""
ROWS = (1, 16, 64, 128, 512, 4096)
GROUPS = ((4, 8192), (8, 4096), (32, 192))
"""Experts, and rows of each."""
EXPERTS = ((4096, 7168), (7168, 2048))
"""N and K of the grouped products."""
FLUSHED_BYTES = 256 * 2**20
Case = tuple[str, Op, tuple[Any, ...], Callable[[], object]]


def dense(rows: Iterable[int], weights: Iterable[tuple[int, int]]) -> Iterator[Case]:
    """Name, op, arguments, and the product in bfloat16."""
    for N, K in weights:
        weight = torch.randn(N, K, dtype=torch.bfloat16) / K**0.5
        pair = quantize(weight, torch.float8_e4m3fn, 128, 128, False)
        for M in rows:
            x = torch.randn(M, K, dtype=torch.bfloat16)
            args = (*quantize(x, torch.float8_e4m3fn, 1, 128, False), *pair, 128, None, None, torch.bfloat16)
            yield f"{M} x {N} x {K}", fp8_matmul, args, lambda x=x, weight=weight: x @ weight.t()


def grouped(groups: Iterable[tuple[int, int]], experts: Iterable[tuple[int, int]]) -> Iterator[Case]:
    """The same for groups of rows, all of one size, and for the gradient of their weights."""
    for N, K in experts:
        for E, rows in groups:
            M = E * rows
            offsets = torch.arange(rows, M + 1, rows, dtype=torch.int32)
            weight = torch.randn(E, N, K, dtype=torch.bfloat16) / K**0.5
            x, dy = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
            e4m3 = torch.float8_e4m3fn
            pairs = *quantize(x, e4m3, 1, 128, False), *quantize(weight, e4m3, 128, 128, False)
            name = f"{E} x {rows} x {N} x {K}"
            bf16 = lambda x=x, weight=weight, offsets=offsets: grouped_matmul(x, weight, offsets)
            yield name, fp8_grouped_matmul, (*pairs, offsets, torch.bfloat16), bf16
            pairs = *quantize(dy, e4m3, 128, 1, False), *quantize(x, e4m3, 128, 1, False)
            bf16 = lambda x=x, dy=dy, offsets=offsets: grouped_matmul_wgrad(dy, x, offsets)
            yield name, fp8_grouped_matmul_wgrad, (*pairs, offsets, torch.float32), bf16


def alternatives(op: Op, args: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
    """Every provider of the op that takes these arguments; the reference only where there is no other."""
    device = args[0].device.type
    able = {p.name: p for p in op.providers if device in p.priority and not p.inline and p.supports(*args) is None}
    names = [name for name in able if name != REFERENCE] or [REFERENCE]
    return {name: lambda name=name: able[name].fn(*args) for name in names}  # type: ignore[misc]


def device_seconds(fn: Callable[[], object], *, rounds: int, cold: bool) -> float:
    """Median of what the device takes for ``fn``."""
    fn()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8) if cold else None
    seconds = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # half a millisecond, in which the host gets ahead
        torch.cuda._sleep(1_000_000)
        if flushed is not None:
            flushed.zero_()
        begin.record()
        fn()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def measure(cases: Iterable[Case], seconds: Callable[..., float], rounds: int) -> list[dict[str, Any]]:
    found = []
    for name, op, args, bf16 in cases:
        cost = op.cost(*args)
        for provider, fn in {**alternatives(op, args), "bfloat16": bf16}.items():
            cold, warm = (seconds(fn, rounds=rounds, cold=cold) for cold in (True, False))
            found.append(
                {
                    "op": op.name,
                    "shape": name,
                    "provider": provider,
                    "cold us": cold * 1e6,
                    "warm us": warm * 1e6,
                    "cold TFLOP/s": cost.flops / cold / 1e12,
                    "cold GB/s": cost.bytes / cold / 1e9,
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(*rows[0]) if rows else Table()
    for row in rows:
        shown.add_row(*(f"{value:.1f}" if isinstance(value, float) else value for value in row.values()))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("wants a GPU")
    with torch.device("cuda"):
        rows = measure(dense(ROWS, WEIGHTS), device_seconds, args.rounds)
        rows += measure(grouped(GROUPS, EXPERTS), device_seconds, args.rounds)
    Console().print(table(rows))
    if args.json:
        machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "date": datetime.date.today().isoformat(),
        }
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
