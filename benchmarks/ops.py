"""What does each provider of each op reach on this device, as a share of the device's measured limits?

Arguments are those of :mod:`deepfuse.profiling.deepseek_v3_arguments`: of DeepSeek-V3's widths on a GPU, of a model of 60
million parameters on a CPU. Limits are measured first: memory, and matrix products in each dtype. On a CPU most providers
are text that Inductor fuses into a graph: they are timed compiled alone, after everything that needs no compiling, with
the first arguments of each number of tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from arguments import real
from cases import Case, Ceilings, Part, Work, first_dtype, measure, providers, run_parts

from deepfuse.ir.op import OPS, Op
from deepfuse.ir.provider import REFERENCE, Provider
from deepfuse.ops import import_ops
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.deepseek_v3_arguments import Widths, arguments_of
from deepfuse.profiling.machine_code import call_text

DEVICE = "auto"
BUDGET = 540.0
TOKENS = {"cpu": (1, 64), "cuda": (1, 64, 1024)}
WIDTHS = {"cpu": Widths(D=512, H=8, C=128, Q=256, R=32, N=128, E=16, K=4, F=256, V=4096, P=8), "cuda": Widths()}
SECONDS = {"cpu": (2.0, 20.0), "cuda": (10.0, 0.0)}
"""An op takes; of one that is compiled."""


def suite(bench: Bench) -> None:
    import_ops()
    run_parts(bench, parts(bench))


def parts(bench: Bench, widths: Widths | None = None, tokens: tuple[int, ...] | None = None) -> Iterator[Part]:
    """The ceilings, and a part for each op; then, on a CPU, one for each of those that have text to compile."""
    device = bench.torch_device
    ceilings = Ceilings(device)
    calls = _calls(widths or WIDTHS[device.type], tokens or TOKENS[device.type])
    quick, slow = SECONDS[device.type]

    def run(found: Iterator[Case], bench: Bench) -> None:
        measure(bench, found, ceilings.limits, rounds=10, temperatures=("warm",))

    yield ceilings.part()
    for op in OPS.values():
        yield op.name, quick, partial(run, cases(op, calls[op.name], device, called))
    for op in OPS.values() if device.type == "cpu" else ():
        if any(_is_text(p, device) for p in op.providers):
            firsts = list({T: args for T, args in reversed(calls[op.name])}.items())[::-1]
            yield f"{op.name}, compiled", slow, partial(run, cases(op, firsts, device, compiled, ", compiled"))


def cases(
    op: Op,
    calls: list[tuple[int, tuple[Any, ...]]],
    device: torch.device,
    alternatives: Callable[..., Any],
    suffix: str = "",
) -> Iterator[Case]:
    """One for each tuple of arguments; several of one number of tokens are numbered."""

    def make(args: tuple[Any, ...]) -> Work:
        made = real(op, args, device)
        facts = {"arguments": call_text(args)}
        return Work(
            alternatives=alternatives(op, made, device), cost=op.cost(*args), dtype=first_dtype(args), facts=facts
        )

    seen: dict[int, int] = {}
    for T, args in calls:
        seen[T] = seen.get(T, 0) + 1
        number = f" ({seen[T]})" if seen[T] > 1 else ""
        yield Case(f"{op.name}, {T} tokens{number}{suffix}", partial(make, args))


def called(op: Op, args: tuple[Any, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """As an eager call runs it: kernels, and the reference."""
    return {**providers(op, args, device), REFERENCE: lambda: op.reference(*args)}


def compiled(op: Op, args: tuple[Any, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """Text for Inductor, each provider compiled alone."""
    # what was compiled for other shapes would count against the limit of recompiles
    torch._dynamo.reset()
    return {
        p.name: partial(torch.compile(p.fn, fullgraph=True, dynamic=False), *args)
        for p in op.providers
        if _is_text(p, device) and p.supports(*args) is None
    }


def _is_text(provider: Provider, device: torch.device) -> bool:
    return provider.inline and device.type in provider.priority


def _calls(widths: Widths, tokens: tuple[int, ...]) -> dict[str, list[tuple[int, tuple[Any, ...]]]]:
    """Name of an op -> numbers of tokens, and arguments."""
    found: dict[str, list[tuple[int, tuple[Any, ...]]]] = {name: [] for name in OPS}
    for T in tokens:
        for name, argument_tuples in arguments_of(T, widths).items():
            found[name] += [(T, args) for args in argument_tuples]
        x, weight = (torch.empty(n, widths.D, dtype=torch.bfloat16, device="meta") for n in (T, 2 * widths.F))
        found["linear"].append((T, (x, weight, None)))
    return found


if __name__ == "__main__":
    run_script(__file__)
