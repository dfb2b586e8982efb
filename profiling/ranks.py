"""Runs of several processes as one: exposed communication, collectives, and who came last to them.

deepfuse profile merge runs/a          where runs/a has rank0, rank1, ...
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepfuse.profiling.collectives import Matched, collectives_of, matched
from deepfuse.profiling.exposure import Exposure, compute_of, exposed_ns, exposure
from deepfuse.profiling.intervals import Interval
from deepfuse.profiling.rank_rows import CollectiveRow, RankRow
from deepfuse.profiling.rank_run import Process, read_ranks
from deepfuse.profiling.run import Run
from deepfuse.profiling.stragglers import Straggler, activities, met_before, straggler


@dataclass(frozen=True, slots=True)
class Ranks:
    """Several runs in the time of the first.

    Attributes:
        collectives: in which every process of their group took part.
        lacking: the others.
        exposures: of each collective, process -> what it cost.
        stragglers: of each collective, who came last.
    """

    processes: Mapping[int, Process]
    runs: Mapping[int, Run]
    collectives: list[Matched]
    lacking: list[Matched]
    exposures: list[Mapping[int, Exposure]]
    stragglers: list[Straggler | None]

    @classmethod
    def read(cls, folder: str | Path) -> "Ranks":
        """What the processes wrote into ``folder``.

        Raises:
            ValueError: runs are missing, are of several profiles, have different steps, or no collectives.
        """
        return cls.of(*read_ranks(folder))

    @classmethod
    def of(cls, processes: Mapping[int, Process], runs: Mapping[int, Run]) -> "Ranks":
        """From runs that are in one time.

        Raises:
            ValueError: there are no collectives in them.
        """
        found = matched({rank: collectives_of(run, processes[rank].groups) for rank, run in runs.items()})
        if not found:
            names = ", ".join(next(iter(runs.values())).graphs)
            raise ValueError(f"ranks: want collectives in the graphs, got none in {names}")
        whole = [m for m in found if not m.lacking]
        lacking = [m for m in found if m.lacking]
        computing = {rank: [compute_of(run, [step]) for step in run.steps] for rank, run in runs.items()}
        return cls(processes, runs, whole, lacking, _exposures(whole, computing), _stragglers(whole, processes, runs))

    def rank_rows(self) -> list[RankRow]:
        """Graph by graph, each process."""
        rows = []
        for graph in next(iter(self.runs.values())).graphs:
            for rank, run in self.runs.items():
                numbers = [i for i, step in enumerate(run.steps) if step.graph == graph]
                steps = [run.steps[i] for i in numbers]
                lasting = [s.ended - s.began for s in steps]
                exposed = [exposed_ns(run, s) for s in steps]
                late, hidden = Counter[int](), Counter[int]()
                for m, costs in zip(self.collectives, self.exposures, strict=True):
                    if rank in costs:
                        late[m.any_call.step] += costs[rank].late_ns
                        hidden[m.any_call.step] += costs[rank].hidden_ns
                rows.append(
                    RankRow(
                        rank,
                        graph,
                        _median_us(lasting),
                        _median_us(exposed),
                        statistics.median(e / max(d, 1) for e, d in zip(exposed, lasting, strict=True)),
                        _median_us(late[i] for i in numbers),
                        _median_us(hidden[i] for i in numbers),
                        sum(
                            s is not None and s.process == rank and m.any_call.graph == graph
                            for m, s in zip(self.collectives, self.stragglers, strict=True)
                        ),
                    )
                )
        return rows

    def collective_rows(self) -> list[CollectiveRow]:
        """The most exposed first."""
        places: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        for i, m in enumerate(self.collectives):
            call = m.any_call
            places.setdefault((call.graph, call.name, call.group[1]), []).append(i)
        rows = [self._collective_row(*place, numbers) for place, numbers in places.items()]
        return sorted(rows, key=lambda row: -row.exposed_us)

    def _collective_row(self, graph: str, name: str, ranks: tuple[int, ...], numbers: list[int]) -> CollectiveRow:
        calls = [list(self.collectives[i].calls.values()) for i in numbers]
        costs = [list(self.exposures[i].values()) for i in numbers]
        named = [s for s in (self.stragglers[i] for i in numbers) if s is not None]
        last = Counter(s.process for s in named).most_common(1)
        mine = [s for s in named if last and s.process == last[0][0]]
        sizes = [c.bytes for several in calls for c in several if c.bytes is not None]

        def mean_us(which: str) -> float:
            return _median_us(statistics.mean(getattr(c, which) for c in several) for several in costs)

        return CollectiveRow(
            graph,
            name,
            ranks,
            len(numbers),
            max(sizes, default=None),
            mean_us("exposed_ns"),
            mean_us("late_ns"),
            mean_us("hidden_ns"),
            _median_us(max(c.ended for c in several) - max(c.arrived for c in several) for several in calls),
            last[0][0] if last else None,
            len(mine),
            _median_us(s.late_ns for s in mine) if mine else 0.0,
            Counter(s.doing for s in mine).most_common(1)[0][0] if mine else "",
        )

    def tables(self, *, most: int = 20) -> list[Table | str]:
        """For people, with rich."""
        ranks = Table(title=self._title(), title_justify="left")
        for column in ("graph", "rank"):
            ranks.add_column(column)
        for column in ("ms a step", "exposed us", "of the step", "for others us", "hidden us", "came last"):
            ranks.add_column(column, justify="right")
        for row in self.rank_rows():
            times = f"{row.exposed_us:,.1f}", f"{row.exposed_share:.1%}", f"{row.late_us:,.1f}", f"{row.hidden_us:,.1f}"
            ranks.add_row(row.graph, str(row.rank), f"{row.step_us / 1e3:,.3f}", *times, str(row.last))
        table = Table(title="collectives, the most exposed first", title_justify="left")
        for column in ("graph", "collective"):
            table.add_column(column)
        for column in ("kB", "exposed us", "for others us", "hidden us", "transfer us"):
            table.add_column(column, justify="right")
        table.add_column("came last")
        table.add_column("behind us", justify="right")
        table.add_column("with")
        rows = self.collective_rows()
        for c in rows[:most]:
            size = "" if c.bytes is None else f"{c.bytes / 1e3:,.1f}"
            numbers = (f"{us:,.1f}" for us in (c.exposed_us, c.late_us, c.hidden_us, c.transfer_us))
            last = (
                ("", "", "")
                if c.last is None
                else (f"rank {c.last} ({c.last_in} of {c.steps})", f"{c.behind_us:,.1f}", c.doing)
            )
            table.add_row(c.graph, c.name, size, *numbers, *last)
        if len(rows) > most:
            table.add_row("", f"({len(rows) - most} more)", "", f"{sum(c.exposed_us for c in rows[most:]):,.1f}")
        return [ranks, table, *map(str, self.problems())]

    def problems(self) -> list[str]:
        """Collectives that not every process of their group called."""
        return [f"{m.any_call}: rank {', '.join(map(str, m.lacking))} lacks it" for m in self.lacking]

    def _title(self) -> str:
        run = next(iter(self.runs.values()))
        off = max(p.clock.uncertainty_ns for p in self.processes.values()) / 1e3
        return f"{run.model}, {len(self.runs)} processes, {run.device}; clocks known to {off:.1f} us"

    def __str__(self) -> str:
        console = Console(width=200, no_color=True)
        with console.capture() as capture:
            console.print(*self.tables())
        return capture.get().rstrip()

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "processes": [asdict(process) for process in self.processes.values()],
            "ranks": [asdict(row) for row in self.rank_rows()],
            "collectives": [asdict(row) for row in self.collective_rows()],
            "lacking": self.problems(),
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.json()))


def _exposures(
    collectives: Iterable[Matched], computing: Mapping[int, list[list[Interval]]]
) -> list[Mapping[int, Exposure]]:
    return [
        {rank: exposure(call, computing[rank][call.step], m.last_arrival) for rank, call in m.calls.items()}
        for m in collectives
    ]


def _stragglers(
    collectives: Iterable[Matched], processes: Mapping[int, Process], runs: Mapping[int, Run]
) -> list[Straggler | None]:
    done = {rank: activities(run) for rank, run in runs.items()}
    began = {rank: run.steps[0].began for rank, run in runs.items()}
    earlier: dict[Any, list[Matched]] = {}
    found = []
    for m in collectives:
        before = earlier.setdefault(m.any_call.group, [])
        uncertain = sorted(processes[rank].clock.uncertainty_ns for rank in m.calls)
        found.append(straggler(m, met_before(before, m, began), done, sum(uncertain[-2:])))
        before.append(m)
    return found


def _median_us(ns: Iterable[float]) -> float:
    return statistics.median(ns) / 1e3
