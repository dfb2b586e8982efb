"""Calls of kernels in Inductor's Python: where each stands in the text, and which sites it computes.

    # deepfuse kernel: 4+8/3+5            the sites, written by deepfuse.ir.private.capture
    stream0 = get_raw_stream(0)           what a kernel on a GPU needs first
    triton_per_fused_0.run(arg0_1, buf3, 8, 256, stream=stream0)

A kernel is what ``async_compile`` defines in the same text, or a call of a library's (``extern_kernels.mm``) or of an op
(``torch.ops.deepfuse.mla_attention.torch``).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deepfuse.ir.private import KERNEL

_DEFINED = re.compile(r"^(\w+) = async_compile\.")
_CALLED = re.compile(r"(?:= |^)([\w.]+)\(")
_NOT_DEFINED_HERE = ("extern_kernels.", "torch.ops.", "aten.")

Sites = tuple[tuple[int, ...], tuple[int, ...]]
"""Numbers of the sites whose results a part of a kernel writes, and of those it computes on the way."""


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One call.

    Attributes:
        name: as it is called: ``cpp_fused_rms_norm_0``, ``triton_per_fused_0.run``, ``extern_kernels.mm``.
        parts: of one kernel; those of Triton and of libraries have one.
        comment: number of the line that says the sites.
        first, last: numbers of the lines of the statement.
    """

    name: str
    parts: tuple[Sites, ...]
    comment: int
    first: int
    last: int


def kernel_calls(lines: Sequence[str]) -> list[KernelCall]:
    """All calls whose sites are known, in order.

    Raises:
        ValueError: there are none.
    """
    defined = {found[1] for found in map(_DEFINED.match, lines) if found is not None}
    calls: list[KernelCall] = []
    comments = [i for i, line in enumerate(lines) if line.lstrip().startswith(KERNEL)]
    for comment, end in pairwise([*comments, len(lines)]):
        first = comment + 1
        while first < end:
            last = _end_of_statement(lines, first)
            called = _CALLED.search(lines[first].strip())
            if called is not None and _is_kernel(called[1], defined):
                parts = lines[comment].split(KERNEL)[1].strip().split("|")
                calls.append(KernelCall(called[1], tuple(map(_sites, parts)), comment, first, last))
                break
            first = last + 1
    if not calls:
        raise ValueError("profile: want code of a graph that this version of deepfuse built, got code without sites")
    return calls


def _is_kernel(called: str, defined: set[str]) -> bool:
    return called.startswith(_NOT_DEFINED_HERE) or called.partition(".")[0] in defined


def _end_of_statement(lines: Sequence[str], first: int) -> int:
    last, opened = first, 0
    if lines[first].lstrip().startswith("#"):
        return first
    while True:
        opened += lines[last].count("(") - lines[last].count(")")
        if opened <= 0 or last + 1 == len(lines):
            return last
        last += 1


def _sites(part: str) -> Sites:
    own, _, others = part.partition("/")
    return tuple(map(int, filter(None, own.split("+")))), tuple(map(int, filter(None, others.split("+"))))
