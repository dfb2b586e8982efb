"""Two runs compared by op: what became faster or slower, what appeared, what vanished."""

import statistics
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from deepfuse.profiling.run import By, Run

Change = Literal["faster", "slower", "same", "appeared", "vanished"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One row of both runs.

    Attributes:
        before_us, after_us: microseconds a step, medians; ``None`` where the run has no such row.
        change: ``same`` where the middle halves of the steps overlap: the machine's moods explain it.
    """

    graph: str
    name: str
    before_us: float | None
    after_us: float | None
    change: Change

    @property
    def us(self) -> float:
        """By how much a step became longer."""
        return (self.after_us or 0.0) - (self.before_us or 0.0)


def compare(before: Run, after: Run, by: By = "op") -> list[Difference]:
    """Rows of two runs, those that changed most first; those of a graph that only one has appeared, or vanished.

    Raises:
        ValueError: they ran on different devices, or have no graph in common.
    """
    devices = [f"{run.device} with {run.threads} threads" for run in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"diff: want two runs of one device, got {devices[0]} and {devices[1]}")
    graphs = dict.fromkeys((*before.graphs, *after.graphs))
    if len(graphs) == len(before.graphs) + len(after.graphs):
        raise ValueError(f"diff: want runs with a graph in common, got {before.graphs} and {after.graphs}")
    rows = []
    for graph in graphs:
        old, new = before.times(graph, by), after.times(graph, by)
        rows += [_difference(graph, name, old.get(name), new.get(name)) for name in {**old, **new}]
    return sorted(rows, key=lambda row: (row.change == "same", -abs(row.us)))


def difference_table(rows: list[Difference], *, most: int = 20) -> Table:
    """For people, with rich: what changed, the ``most`` of it, and one row for what did not."""
    table = Table(title="what changed", title_justify="left")
    table.add_column("graph")
    table.add_column("name")
    for column in ("before us", "after us", "change us"):
        table.add_column(column, justify="right")
    table.add_column("")
    changed = [row for row in rows if row.change != "same"]
    for row in changed[:most]:
        numbers = ("" if us is None else f"{us:,.1f}" for us in (row.before_us, row.after_us))
        table.add_row(row.graph, row.name, *numbers, f"{row.us:+,.1f}", row.change)
    if len(changed) > most:
        table.add_row("", f"({len(changed) - most} more)", "", "", f"{sum(r.us for r in changed[most:]):+,.1f}", "")
    same = [row for row in rows if row.change == "same"]
    table.add_row("", f"({len(same)} rows)", "", "", f"{sum(row.us for row in same):+,.1f}", "same")
    return table


def _difference(graph: str, name: str, old: list[int] | None, new: list[int] | None) -> Difference:
    return Difference(graph, name, _median_us(old), _median_us(new), _change(old, new))


def _median_us(times: list[int] | None) -> float | None:
    return None if times is None else statistics.median(times) / 1e3


def _change(old: list[int] | None, new: list[int] | None) -> Change:
    if old is None:
        return "appeared"
    if new is None:
        return "vanished"
    (old_low, old_high), (new_low, new_high) = _middle_half(old), _middle_half(new)
    if new_high < old_low:
        return "faster"
    return "slower" if new_low > old_high else "same"


def _middle_half(times: list[int]) -> tuple[float, float]:
    """First and last quartile; of one step, itself."""
    if len(times) == 1:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high
