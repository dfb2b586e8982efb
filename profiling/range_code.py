"""Inductor's code with NVTX ranges around the calls of its kernels, without another build.

    deepfuse_push(0)                          the block, open from its first kernel to its last
    deepfuse_push(1)                          the kernel
    extern_kernels.mm(arg0_1, arg1_1, out=buf0)
    deepfuse_pop()
    ...
    deepfuse_pop()

It is a copy, as that with clocks is (:mod:`deepfuse.profiling.instrument`), and both can be made of the same code. The
comments that say which sites a kernel computes are in every build, so that there is no build for ranges: a model costs the
same with and without, ranges survive in the compile cache, and no graph has a node for them.
"""

from collections.abc import Iterator, Mapping, Sequence

from deepfuse.passes.kernel_calls import KernelCall, kernel_calls
from deepfuse.passes.sites import Site
from deepfuse.profiling.instrument import sites_in
from deepfuse.profiling.nvtx import Naming, Range, nested
from deepfuse.profiling.timeline import Part


def with_ranges(source: str) -> tuple[str, list[Range]]:
    """Inductor's Python with ``deepfuse_push(number)`` and ``deepfuse_pop()``, and the ranges by number.

    Raises:
        ValueError: nothing in it says which sites a kernel computes.
    """
    lines = source.splitlines()
    calls = kernel_calls(lines)
    sites = sites_in(source)
    naming = Naming(sites.values())
    paths = []
    for number, (call, suite) in enumerate(zip(calls, _suites(lines, calls), strict=True)):
        *blocks, op = naming.path(_part(call, sites))
        # each call has a range of its own, also where the one before has the same name
        paths.append([(block, suite) for block in blocks] + [(op, number)])
    ranges: list[Range] = []
    inserted: dict[int, list[str]] = {}
    for call, (opened, closed) in zip(calls, nested(paths), strict=True):
        indent = " " * _indent(lines[call.first])
        for range, _ in opened:
            inserted.setdefault(call.first, []).append(f"{indent}deepfuse_push({len(ranges)})")
            ranges.append(range)
        inserted.setdefault(call.last + 1, []).extend([f"{indent}deepfuse_pop()"] * closed)
    text = [line for i, old in enumerate(lines) for line in (*inserted.get(i, ()), old)]
    return "\n".join([*text, *inserted.get(len(lines), ())]) + "\n", ranges


def _part(call: KernelCall, sites: Mapping[int, Site]) -> Part:
    """All of a kernel as one part: a range stands around the call."""
    own = dict.fromkeys(n for written, _ in call.parts for n in written)
    taken_in = dict.fromkeys(n for _, others in call.parts for n in others if n not in own)
    return Part(call.name, tuple(sites[n] for n in own), tuple(sites[n] for n in taken_in))


def _suites(lines: Sequence[str], calls: Sequence[KernelCall]) -> Iterator[int]:
    """Of each call, a number that it shares with those of the same suite of statements: a range must end where it began."""
    suite = 0
    for before, call in zip([None, *calls], calls, strict=False):
        if before is not None:
            between = [_indent(line) for line in lines[before.last + 1 : call.first] if line.strip()]
            left = min(between, default=_indent(lines[call.first])) < _indent(lines[before.first])
            suite += left or _indent(lines[call.first]) != _indent(lines[before.first])
        yield suite


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
