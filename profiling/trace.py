"""A profile as a trace for Perfetto and chrome://tracing, in the model's own words.

Format: Trace Event Format, complete events (``ph: X``), microseconds. Three rows: graphs; blocks, each for as long as
kernels of it follow one another; parts of kernels by module and op.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Step

ROWS = {1: "graphs", 2: "blocks", 3: "kernels"}


def write_trace(run: Run, path: Path) -> None:
    """Write ``path``, gzipped JSON."""
    write_events(trace_events(run), path)


def write_events(events: Iterable[dict[str, Any]], path: Path) -> None:
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": list(events), "displayTimeUnit": "ms"}, file)


def trace_events(run: Run, *, process: int = 0, origin: int | None = None) -> Iterator[dict[str, Any]]:
    """Events of all steps.

    Args:
        process: number of the process in the trace.
        origin: where its time begins; with the first step where ``None``.
    """
    for row, name in ROWS.items():
        yield {"ph": "M", "pid": process, "tid": row, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": process, "tid": row, "name": "thread_sort_index", "args": {"sort_index": row}}
    if origin is None:
        origin = run.steps[0].began if run.steps else 0
    for number, step in enumerate(run.steps):
        arguments = {"step": number, **step.sizes}
        for event in (
            _event(1, step.graph, step.began, step.ended, origin, arguments),
            *kernel_events(run.parts[step.graph], step, origin),
        ):
            yield {**event, "pid": process}


def kernel_events(parts: list[list[Part]], step: Step, origin: int) -> Iterator[dict[str, Any]]:
    """Blocks and parts of kernels of one step; ``origin`` is the clock's time at 0."""
    block, began, ended = "", 0, 0
    for span in step.spans:
        part = parts[span.kernel][span.part]
        arguments: dict[str, Any] = {"kernel": part.kernel, "blocks": list(part.blocks)}
        if part.taken_in:
            arguments["with"] = list(dict.fromkeys(site.name for site in part.taken_in))
        yield _event(3, part.name, span.began, span.ended, origin, arguments)
        name = " + ".join(part.blocks) or part.name
        if name != block:
            if block:
                yield _event(2, block, began, ended, origin, {})
            block, began = name, span.began
        ended = span.ended
    if block:
        yield _event(2, block, began, ended, origin, {})


def _event(row: int, name: str, began: int, ended: int, origin: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "tid": row,
        "cat": ROWS[row],
        "name": name,
        "ts": (began - origin) / 1e3,
        "dur": (ended - began) / 1e3,
        "args": arguments,
    }
