"""Inductor's code with clocks in it: when each part of each kernel began and ended, without another build.

What a build keeps is Inductor's Python, with the C++ of its kernels, and comments that say which sites a kernel computes,
and what they are (:func:`deepfuse.ir.private.capture`). On a CPU a decode step may be one kernel of many parts, so that clocks around the
calls of kernels say little. Here a copy of the code is made, in which

- a clock stands before and after each call of a kernel in the Python,
- the main thread writes the time down before each part of a C++ kernel, and at its end, into an array it is given;
- the graph's free sizes are noted.

Parts end at a barrier, so that the main thread's time is that of all. Kernels of the copy are compiled once and kept in
Inductor's cache. The original does not change: it costs nothing while nobody profiles. For as long as somebody does, its
``call`` calls the copy's.
"""

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from deepfuse.ir.private import NOTED, PART, load_code
from deepfuse.passes.kernel_calls import Sites, kernel_calls
from deepfuse.passes.sites import Site
from deepfuse.profiling.called_frames import called_frames
from deepfuse.profiling.device_clock import Clock, HostClock
from deepfuse.profiling.timeline import Span
from deepfuse.runtime.compile_cache import inductor_cache

CLOCK = """#include <ctime>
static inline int64_t deepfuse_now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
"""
"""The clock of ``time.perf_counter_ns`` on Linux."""
_DEFINITION = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\(\[(.*?)\], r'''(.*?)'''\)$", re.MULTILINE | re.DOTALL)
_SIZE = re.compile(r"^([ ]+)([su]\d+) = .*$", re.MULTILINE)


Readings = list[tuple[int, list[int]]]


@dataclass(slots=True)
class Kernel:
    """One call of a kernel in a graph's code."""

    name: str
    """``cpp_fused_rms_norm_0``, ``extern_kernels.mm``, ``torch.ops.deepfuse.mla_attention.torch``."""
    parts: list[Sites]
    """Of each part, the numbers of the sites whose results it writes, and of those it computes on the way."""
    clocked: bool
    """Whether its parts have clocks of their own; else the call is one part."""


class Instrumented:
    """The copy of one graph's code, and what its clocks said."""

    def __init__(self, source: str, owner: Mapping[str, Any] | None = None, clock: Clock | None = None):
        """``source``: Inductor's Python; ``owner``: the names of its module, of which ours are those of the copy too;
        ``clock``: the host's where it is ``None``."""
        text, self.kernels = instrument(source)
        self.sites = sites_in(source)
        with inductor_cache():
            self.module = load_code(text)
        self._marks = [torch.zeros(len(k.parts) + 1, dtype=torch.int64) if k.clocked else None for k in self.kernels]
        self._log: list[tuple[int, Any, Any]] = []
        self.clock = clock or HostClock()
        self.sizes: dict[str, int] = {}
        vars(self.module).update({k: v for k, v in (owner or {}).items() if k.startswith("deepfuse_")})
        vars(self.module).update(
            deepfuse_now=self.clock.now,
            deepfuse_log=self._log.append,
            deepfuse_marks=self._marks,
            deepfuse_sizes=self.sizes,
        )
        self._call: Callable[[Any], Any] = self.module.call
        self.began = self.ended = 0

    def __call__(self, args: Any) -> Any:
        self._log.clear()
        self.clock.start()
        began = self.clock.now()
        result = self._call(args)
        ended = self.clock.now()
        self.clock.finish()
        self.began, self.ended = self.clock.nanoseconds(began), self.clock.nanoseconds(ended)
        return result

    def readings(self) -> Readings:
        """Of the last call, each kernel's number and its times: the beginning of each part, and the end."""
        marks, ns = self._marks, self.clock.nanoseconds
        return [
            (number, [ns(began), ns(ended)] if marks[number] is None else marks[number].tolist())  # type: ignore[union-attr]
            for number, began, ended in self._log
        ]


def spans_of(readings: Readings) -> list[Span]:
    """In order. Not between the steps: a thousand objects would be in the way of the next one's caches."""
    return [Span(number, i, *between) for number, times in readings for i, between in enumerate(pairwise(times))]


def instrument(source: str) -> tuple[str, list[Kernel]]:
    """Inductor's Python with clocks, and its calls of kernels in order.

    Raises:
        ValueError: nothing in it says which sites a kernel computes.
    """
    clocks = {name: code.count(PART) for name, _, code in _DEFINITION.findall(source)}
    lines = _DEFINITION.sub(_with_clocks, source).splitlines()
    kernels: list[Kernel] = []
    # the last first, so that the lines of the others keep their numbers
    for number, call in reversed([*enumerate(kernel_calls(lines))]):
        first = lines[call.first]
        indent = first[: len(first) - len(first.lstrip())]
        statement = " ".join(line.strip() for line in lines[call.first : call.last + 1])
        parts = list(call.parts)
        clocked = clocks.get(call.name, 0) == len(parts)
        if call.name in clocks:
            marks = f"deepfuse_marks[{number}]" if clocked else "deepfuse_unread"
            statement = f"{statement[: statement.rindex(')')]}, {marks})"
        if not clocked:
            parts = [(_once(own for own, _ in parts), _once(others for _, others in parts))]
        kernels.append(Kernel(call.name, parts, clocked))
        lines[call.first : call.last + 1] = [
            f"{indent}deepfuse_began = deepfuse_now()",
            f"{indent}{statement}",
            f"{indent}deepfuse_log(({number}, deepfuse_began, deepfuse_now()))",
        ]
    text = _SIZE.sub(r'\g<0>\n\1deepfuse_sizes["\2"] = \2', "\n".join(lines))
    unread = f"import torch\ndeepfuse_unread = torch.zeros({max(clocks.values(), default=0) + 1}, dtype=torch.int64)\n"
    return f"{unread}{text}\n", kernels[::-1]


def sites_in(source: str) -> dict[int, Site]:
    """Number of a site -> the site, as Inductor's Python has them in comments."""
    lines = (line.strip() for line in source.splitlines())
    found = [json.loads(line.removeprefix(NOTED)) for line in lines if line.startswith(NOTED)]
    return {site["number"]: Site(**site) for site in found}


def _with_clocks(definition: re.Match[str]) -> str:
    """A C++ kernel that takes one more argument, an array, and writes the beginning of each part and its end there."""
    name, types_, code = definition.groups()
    head, opening, body = code.partition(")\n{")
    body, closing, tail = body.rpartition("}")
    pieces = body.split(PART)
    mark = "#pragma omp master\n    {{ deepfuse_marks[{}] = deepfuse_now(); }}\n"
    marked = pieces[0] + "".join(mark.format(i) + piece for i, piece in enumerate(pieces[1:]))
    end = f"    deepfuse_marks[{len(pieces) - 1}] = deepfuse_now();\n"
    head = head.replace('extern "C"', f'{CLOCK}extern "C"', 1) + ", int64_t* deepfuse_marks"
    return f"{name} = async_compile.cpp_pybinding([{types_}, 'int64_t*'], r'''{head}{opening}{marked}{end}{closing}{tail}''')"


def _once(numbers: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(n for several in numbers for n in several))


def code_called_by(fn: Callable[[], Any]) -> tuple[dict[str, Any], str, Any]:
    """The module of Inductor's code whose ``call`` the function reaches, its names, and its text; and what ``fn`` returns.

    Where there are several, the last: a first call may compile, and run other code before its own.

    Raises:
        ValueError: it calls no such code, or it is being profiled already.
    """

    def look(frame: types.FrameType) -> tuple[dict[str, Any], str] | None:
        # not the frame, which would keep its tensors
        of_inductor = frame.f_code.co_name == "call" and "extern_kernels" in frame.f_globals
        return (frame.f_globals, frame.f_code.co_filename) if of_inductor else None

    found, result = called_frames(fn, look)
    if not found:
        raise ValueError("profile: want a compiled model, got one whose graphs call no code of Inductor's")
    owner, path = found[-1]
    if "deepfuse_call" in owner or "deepfuse_log" in owner:
        raise ValueError("profile: want one profile at a time, got one of a model that is being profiled")
    return owner, Path(path).read_text(), result


@contextmanager
def replaced(owner: dict[str, Any], call: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the code of that module passes its calls on."""
    method: Any = owner["call"]
    original: Any = getattr(method, "__func__", method)
    stand_in = _call_of_a_method if isinstance(method, types.MethodType) else _call
    # who calls it holds the function, so that its code changes and not its name
    kept, owner["deepfuse_call"] = original.__code__, call
    original.__code__ = stand_in.__code__
    try:
        yield
    finally:
        original.__code__ = kept
        del owner["deepfuse_call"]


def _call(args: Any) -> Any:
    return deepfuse_call(args)  # type: ignore[name-defined]  # noqa: F821 - of the module it is put into


def _call_of_a_method(self: Any, args: Any) -> Any:
    return deepfuse_call(args)  # type: ignore[name-defined]  # noqa: F821
