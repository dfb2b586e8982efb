"""Runs of several processes as one trace for Perfetto and chrome://tracing: a process there is a process here.

Beside the rows of :mod:`deepfuse.profiling.trace` each process has its collectives, from start to end, as asynchronous
events; an arrow leads from the start by the process that came last to the waits that it ended.
Format: Trace Event Format; ``b`` and ``e`` begin and end an asynchronous event, ``s`` and ``f`` an arrow.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepfuse.profiling.collectives import Matched
from deepfuse.profiling.ranks import Ranks
from deepfuse.profiling.stragglers import Straggler
from deepfuse.profiling.trace import ROWS, trace_events, write_events

KERNELS = next(row for row, name in ROWS.items() if name == "kernels")


def write_rank_trace(ranks: Ranks, path: Path) -> None:
    """Write ``path``, gzipped JSON."""
    write_events(rank_events(ranks), path)


def rank_events(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Events of all processes; time begins with the first step of any."""
    origin = min(run.steps[0].began for run in ranks.runs.values())
    for rank, run in ranks.runs.items():
        name = f"rank {rank} on {ranks.processes[rank].host}"
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
        yield from trace_events(run, process=rank, origin=origin)
    for number, m in enumerate([*ranks.collectives, *ranks.lacking]):
        costs = ranks.exposures[number] if number < len(ranks.exposures) else {}
        for rank, call in m.calls.items():
            event = {"cat": "collectives", "name": call.name, "id": number, "pid": rank, "tid": KERNELS}
            arguments: dict[str, Any] = {"bytes": call.bytes, "ranks": list(call.group[1]), "step": call.step}
            if rank in costs:
                cost = costs[rank]
                arguments |= {
                    "exposed us": cost.exposed_ns / 1e3,
                    "for others us": cost.late_ns / 1e3,
                    "hidden us": cost.hidden_ns / 1e3,
                }
            if m.lacking:
                arguments["lacking in"] = list(m.lacking)
            yield {**event, "ph": "b", "ts": (call.arrived - origin) / 1e3, "args": arguments}
            yield {**event, "ph": "e", "ts": (call.ended - origin) / 1e3}
    for number, (m, last) in enumerate(zip(ranks.collectives, ranks.stragglers, strict=True)):
        if last is not None:
            yield from _arrows(number, m, last, origin)


def _arrows(number: int, m: Matched, last: Straggler, origin: int) -> Iterator[dict[str, Any]]:
    """From the start by the last to the waits of the others."""
    start = m.calls[last.process].start
    for rank, call in m.calls.items():
        if rank == last.process or not call.waits or call.ended <= start[0]:
            continue
        arrow = {"cat": "came last", "name": last.doing, "id": f"{number}.{rank}", "tid": KERNELS}
        yield {**arrow, "ph": "s", "pid": last.process, "ts": (start[0] - origin) / 1e3}
        # within the slice of the wait, whose end is not in it
        yield {**arrow, "ph": "f", "bp": "e", "pid": rank, "ts": (call.ended - 1 - origin) / 1e3}
