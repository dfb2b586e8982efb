"""Which configuration of each kernel is the fastest on this GPU, for DeepSeek-V3's shapes, and how far is ours from it?

Every value of every knob (:mod:`knobs`) is tried, one knob after another, on the cases of the suite ``gpu``, with a cold L2
cache. One that does not fit the device, or computes something else, is out. In the end the winner and what launch code
chooses are timed once more, in turn. A part is a kernel: ``--only fp8_matmul.triton`` tunes one, and with ``--json`` of an
earlier run the others stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from attention import decode, prompts
from canary import refused
from cases import SPARE_SECONDS, Case, Part, run_parts
from fusions import fusions
from knobs import KNOBS, Knob
from products import dense, grouped
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_results import Results
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.device_timing import device_timing, first_error

DEVICE = "cuda"
BUDGET = 540.0
GENERATORS: Mapping[str, Callable[..., Iterator[Case]]] = {
    "dense": dense,
    "grouped": grouped,
    "decode": decode,
    "prompts": prompts,
    "fusions": fusions,
}
OTHER = 2.0**-7
"""Of the norm of a result: beyond it a configuration computes something else. In another order a sum in bfloat16 is at most
one value of 2**-8 away, and the operands of a second product may be too."""
OTHER_FP8 = 0.05
"""Where that is rounded to FP8, whose values lie 2**-3 apart, some 2**-8 / 2**-3 of them fall to the other side: the root of
that many times at most 2**-3 is 0.02."""
Settings = tuple[tuple[Knob, Any], ...]


def suite(bench: Bench, sizes: Mapping[str, Mapping[str, Any]] = {}, rounds: int = 10) -> None:
    """``sizes``: arguments of the generators of cases, by name; tests take small ones."""
    run_parts(bench, parts(sizes, rounds))
    Console().print(winners(bench.results))


def parts(sizes: Mapping[str, Mapping[str, Any]], rounds: int) -> Iterator[Part]:
    for kernel in KNOBS:
        yield kernel, 60, partial(tune, kernel, sizes, rounds)


def tune(kernel: str, sizes: Mapping[str, Mapping[str, Any]], rounds: int, bench: Bench) -> None:
    """A row for each case of the suite ``gpu`` that has this ``op.provider``."""
    op, _, provider = kernel.partition(".")
    device = bench.torch_device
    if provider == "gluon" and (why := refused([kernel], device)):
        bench.leave_out(kernel, why[kernel])
        return
    for name, generator in GENERATORS.items():
        for case in generator(device, **sizes.get(name, {})):
            if case.name.split()[0] != op:
                continue
            if bench.seconds_left < SPARE_SECONDS:
                bench.leave_out(f"{case.name}, {provider}", "the budget is spent")
                continue
            error = first_error(partial(_tune, bench, kernel, case, rounds), device)
            if error is not None:
                bench.leave_out(f"{case.name}, {provider}", error)


def _tune(bench: Bench, kernel: str, case: Case, rounds: int) -> None:
    provider, device = kernel.partition(".")[2], bench.torch_device
    work = case.make()
    call = work.alternatives.get(provider)
    if call is None:
        return
    expected = call()
    best: Settings = ()
    fastest = _seconds(call, expected, device, rounds)
    tried: dict[str, float | str] = {}
    for knob in KNOBS[kernel]:
        before = best
        for value in knob.values if case.name.startswith(knob.cases) else ():
            if not knob.fits(value, _rows(work.facts)):
                continue
            settings = (*before, (knob, value))
            seconds = _seconds(_with(settings, call), expected, device, rounds)
            tried[words(settings)] = seconds if isinstance(seconds, str) else float(f"{seconds * 1e6:.4g}")
            if not isinstance(seconds, str) and (isinstance(fastest, str) or seconds < fastest):
                best, fastest = settings, seconds
    pair = {"ours": call, "winner": _with(best, call)}
    timings = device_timing(pair, device=device, cold=device.type == "cuda", rounds=max(rounds, 5))
    bench.row(f"{case.name}, {provider}", timings, unit="us", winner=words(best) or "ours", tried=tried)


def _seconds(call: Callable[[], Any], expected: Any, device: torch.device, rounds: int) -> float | str:
    """Median, or what is wrong with it."""
    error = first_error(call, device)
    if error is not None:
        return error
    for ours, theirs in zip(_tensors(call()), _tensors(expected), strict=True):
        error_norm = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30)
        if not error_norm <= (OTHER_FP8 if theirs.dtype.itemsize == 1 else OTHER):
            return f"other results, by {error_norm.item():.2g} of their norm"
    return device_timing({"": call}, device=device, cold=device.type == "cuda", rounds=max(rounds, 5))[""].median


def _with(settings: Settings, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with ExitStack() as stack:
            for knob, value in settings:
                stack.enter_context(knob.set(value))
            return call()

    return run


def _rows(facts: Mapping[str, Any]) -> int:
    """Of a tile's operand: tokens, or those of a group."""
    if "M" in facts:
        return facts["M"] // facts.get("E", 1)
    return facts["shape"][0] if "shape" in facts else facts["B"]


def _tensors(values: Any) -> Sequence[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.numel()]


def words(settings: Settings) -> str:
    """``_tile (64, 16, 4, 6), _splits 4``."""
    return ", ".join(f"{knob.name} {_value(value)}" for knob, value in settings)


def _value(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def winners(results: Results) -> Table:
    """What was chosen and what would be faster, a kernel and shape a line."""
    table = Table("case", "ours us", "winner us", "winner", title="configurations", title_justify="left")
    for row in results.rows:
        ours, winner = row.figures["ours"][0], row.figures["winner"][0]
        table.add_row(row.name, f"{ours:.2f}", f"{winner:.2f}", str(row.facts["winner"]))
    return table


if __name__ == "__main__":
    run_script(__file__)
