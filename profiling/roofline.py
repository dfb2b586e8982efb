"""What each op of a run should take on the device it ran on, beside what it took: time lost, the most first.

    bound = max(flops / peak, bytes / bandwidth)         the roofline of Williams et al. 2009
    lost  = measured - bound

FLOPs and bytes are the op's own (:mod:`deepfuse.ir.cost`): each input read once, each result written once. Where one loop
computes several ops their time cannot be told apart, and they are one row, for which their bounds are added. An op that a
loop only takes in (a SwiGLU in the loop that prepares the next product) is in nobody's bound. Weights that lie in the
CPU's caches come faster than memory gives them: then less is lost than nothing.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from deepfuse.ir.device import Device
from deepfuse.passes.sites import Site
from deepfuse.profiling.run import Run
from deepfuse.profiling.size_expression import evaluated
from deepfuse.profiling.timeline import Step

Limits = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step: FLOPs, bytes, and what they take at least."""

    flops: float
    bytes: float
    seconds: float
    limit: str


@dataclass(frozen=True, slots=True)
class Bounded:
    """One op, or several that share loops.

    Attributes:
        us: measured a step, the median over the steps.
        flops, bytes, bound_us: a step; ``None`` where an op has no cost.
        limit: what bounds it: ``memory`` or ``arithmetic``; ``both`` where calls differ.
    """

    graph: str
    name: str
    us: float
    flops: float | None
    bytes: float | None
    bound_us: float | None
    limit: str

    @property
    def lost_us(self) -> float | None:
        return None if self.bound_us is None else self.us - self.bound_us


def limits_of(device: Device) -> dict[str, float]:
    """Bytes a second (``bytes``) and floating-point operations a second by dtype, as a run keeps them."""
    return {"bytes": device.memory_bandwidth, **{str(d).removeprefix("torch."): f for d, f in device.flops.items()}}


def roofline(run: Run, by: Literal["op", "place"] = "op") -> list[Bounded]:
    """Every op of the run, the most time lost first; what has no cost comes last.

    Raises:
        ValueError: the run knows no limits of its device, or ``by`` is something else.
    """
    if not run.limits:
        raise ValueError("roofline: want a run that knows its device's limits, got one without")
    if by not in ("op", "place"):
        raise ValueError(f"roofline: want rows by 'op' or 'place', got {by!r}")
    rows = []
    for graph in run.graphs:
        groups = _groups(run, graph)
        names = {number: _name(group, by) for number, group in groups.items()}
        steps = run.steps_of(graph)
        measured = [_measured(run, step, names) for step in steps]
        for name in dict.fromkeys(names.values()):
            calls = {site.number: site for number, group in groups.items() if names[number] == name for site in group}
            work = [_work(calls.values(), step.sizes, run.limits) for step in steps]
            us = statistics.median(m.get(name, 0) for m in measured) / 1e3
            rows.append(Bounded(graph, name, us, *_median(work)))
    return sorted(rows, key=lambda row: (row.lost_us is None, -(row.lost_us or row.us)))


def roofline_table(run: Run, by: Literal["op", "place"] = "op", *, most: int = 20) -> Table:
    """:func:`roofline` for people, with rich."""
    table = Table(title="time lost against the device's limits", title_justify="left")
    table.add_column("graph")
    table.add_column(by)
    for column in ("us a step", "bound us", "lost us", "MFLOP", "MB"):
        table.add_column(column, justify="right")
    table.add_column("limit")
    for row in roofline(run, by)[:most]:
        numbers = (row.us, row.bound_us, row.lost_us, _millions(row.flops), _millions(row.bytes))
        table.add_row(row.graph, row.name, *("" if n is None else f"{n:,.1f}" for n in numbers), row.limit)
    return table


def _groups(run: Run, graph: str) -> dict[int, list[Site]]:
    """Number of a site -> the sites whose loops it shares, itself among them."""
    groups: dict[int, list[Site]] = {}
    for kernel in run.parts[graph]:
        for part in kernel:
            together: dict[int, Site] = {}
            for site in part.own:
                together |= {s.number: s for s in groups.get(site.number, [site])}
            for number in together:
                groups[number] = [together[n] for n in sorted(together)]
    return groups


def _name(group: list[Site], by: str) -> str:
    return " + ".join(dict.fromkeys(site.op if by == "op" else site.name for site in group))


def _measured(run: Run, step: Step, names: Mapping[int, str]) -> dict[str, int]:
    times: dict[str, int] = {}
    for span in step.spans:
        own = run.parts[step.graph][span.kernel][span.part].own
        if own:
            name = names[own[0].number]
            times[name] = times.get(name, 0) + span.ended - span.began
    return times


def _work(sites: Iterable[Site], sizes: Mapping[str, int], limits: Limits) -> Work | None:
    """``None`` if one of the sites has no cost."""
    total_flops = total_bytes = seconds = 0.0
    bounds = set()
    for site in sites:
        flops, size = evaluated(site.flops, sizes), evaluated(site.bytes, sizes)
        if flops is None or size is None:
            return None
        arithmetic = flops / limits.get(site.dtype, limits["float32"])
        memory = size / limits["bytes"]
        bounds.add("arithmetic" if arithmetic > memory else "memory")
        seconds += max(arithmetic, memory)
        total_flops, total_bytes = total_flops + flops, total_bytes + size
    return Work(total_flops, total_bytes, seconds, bounds.pop() if len(bounds) == 1 else "both")


def _median(work: list[Work | None]) -> tuple[float | None, float | None, float | None, str]:
    known = [w for w in work if w is not None]
    if len(known) < len(work):
        return None, None, None, ""
    flops, size, seconds = (
        statistics.median(getattr(w, what) for w in known) for what in ("flops", "bytes", "seconds")
    )
    return flops, size, seconds * 1e6, known[0].limit


def _millions(number: float | None) -> float | None:
    return None if number is None else number / 1e6
