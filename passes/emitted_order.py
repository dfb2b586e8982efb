"""Whether transfers are in flight over what the graph has between start and wait, in the code that Inductor emits.

    buf0 = torch.ops._c10d_functional.all_to_all_single.default(arg0_1, ...)       # kernel: 0
    extern_kernels.mm(arg0_1, arg1_1, out=buf1)                                    # kernel: 1, planned in between
    torch.ops._c10d_functional.wait_tensor.default(buf0)                           # kernel: 2

The message and what it becomes must keep their memory until the wait: no other tensor may take it in between.
"""

import re
from collections import Counter
from dataclasses import dataclass

from deepfuse.ir.private import COLLECTIVES
from deepfuse.passes.kernel_calls import KernelCall, kernel_calls

_CALL = re.compile(rf"(\w+) = torch\.ops\.{COLLECTIVES}\.\w+\.default\((\w+)")
_TAKEN = re.compile(r"= (?:reinterpret_tensor\()?(\w+)\b.*# reuse")


@dataclass(frozen=True, slots=True)
class Flight:
    """A transfer as the graph has it, by numbers of sites.

    Attributes:
        start, wait: of the collective.
        under: of each kernel between the two.
    """

    start: int
    wait: int
    under: tuple[int, ...]


def undone(source: str, flights: list[Flight]) -> list[str]:
    """What of the order is not in the code, in a line for each transfer; nothing where all of it is.

    Args:
        source: Inductor's Python, with the sites of its kernels.

    Raises:
        RuntimeError: other tensors take the memory of a message while it is on its way.
    """
    lines = source.splitlines()
    calls = kernel_calls(lines)
    return [problem for flight in flights if (problem := _problem(flight, calls, lines))]


def _problem(flight: Flight, calls: list[KernelCall], lines: list[str]) -> str:
    begin, end = (next((i for i, c in enumerate(calls) if n in _own(c)), None) for n in (flight.start, flight.wait))
    if begin is None or end is None:
        return f"transfer {flight.start}: its start or its wait is no call of the code"
    between = Counter(n for call in calls[begin + 1 : end] for n in _own(call))
    missing = Counter(flight.under) - between
    if missing:
        return f"transfer {flight.start}: {missing.total()} of {len(flight.under)} kernels do not run under it"
    found = _CALL.search(lines[calls[begin].first])
    buffers = found.groups() if found else ()
    for line in lines[calls[begin].last + 1 : calls[end].first]:
        taken = _TAKEN.search(line)
        if taken is not None and taken[1] in buffers:
            raise RuntimeError(
                f"transfer {flight.start}: want its memory left alone while it is on its way, got {line.strip()}; "
                'build with passes=deepfuse.passes.default().without("overlap_all_to_all"), and report it'
            )
    return ""


def _own(call: KernelCall) -> set[int]:
    return {number for own, _ in call.parts for number in own}
