"""A profiled run: rows by op, by block or by place, as a table, as JSON, and read back."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from deepfuse.passes.sites import Site
from deepfuse.profiling.timeline import Part, Span, Step

WRAPPER, GUARDS = "(wrapper)", "(guards)"
"""Rows of what is no kernel: Inductor's Python between kernels, and what runs around it."""
By = Literal["op", "block", "place"]


@dataclass(frozen=True, slots=True)
class Row:
    """What one name took in one graph.

    Attributes:
        graph: ``prefill``, ``decode_1``, ...
        name: of the op, the block, or module and op; ``a + b`` where a kernel spans both.
        calls: parts of kernels a step.
        us: microseconds a step, the median over the steps: one that was interrupted says nothing of the model.
        share: of all rows of the graph.
    """

    graph: str
    name: str
    calls: float
    us: float
    share: float


@dataclass(slots=True, kw_only=True)
class Run:
    """What was recorded."""

    model: str
    dtype: str
    device: str
    threads: int
    torch: str
    date: str
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of the device: bytes a second (``bytes``), and floating-point operations a second by dtype."""
    parts: dict[str, list[list[Part]]] = field(default_factory=dict)
    """Graph -> kernel -> part."""
    steps: list[Step] = field(default_factory=list)
    build: dict[str, Any] = field(default_factory=dict)
    """Of the model: ``matches`` (graph -> pass -> rewrites), ``graph_breaks``, ``recompiles``, ``graphs_from_cache``."""

    def rows(self, by: By = "op") -> list[Row]:
        """Rows of all graphs, the longest first; ``by`` op, block or place (module and op).

        Raises:
            ValueError: ``by`` is none of these.
        """
        if by not in ("op", "block", "place"):
            raise ValueError(f"run: want rows by 'op', 'block' or 'place', got {by!r}")
        found = []
        for graph in self.graphs:
            steps = self.steps_of(graph)
            calls = Counter(name for step in steps for name, _ in self._times(step, by))
            medians = {name: statistics.median(ns) / 1e3 for name, ns in self.times(graph, by).items()}
            total = sum(medians.values())
            found += [
                Row(graph, name, calls[name] / len(steps), us, us / total if total else 0.0)
                for name, us in medians.items()
            ]
        return sorted(found, key=lambda row: (self.graphs.index(row.graph), -row.us))

    def times(self, graph: str, by: By = "op") -> dict[str, list[int]]:
        """Name -> nanoseconds of each step of a graph."""
        times: dict[str, list[int]] = {}
        for step in self.steps_of(graph):
            for name, ns in self.times_of(step, by).items():
                times.setdefault(name, []).append(ns)
        return times

    def times_of(self, step: Step, by: By = "op") -> dict[str, int]:
        """Name -> nanoseconds of one step."""
        times: dict[str, int] = {}
        for name, ns in self._times(step, by):
            times[name] = times.get(name, 0) + ns
        return times

    @property
    def graphs(self) -> list[str]:
        """Those that ran, in the order they first did."""
        return list(dict.fromkeys(step.graph for step in self.steps))

    def steps_of(self, graph: str) -> list[Step]:
        return [step for step in self.steps if step.graph == graph]

    def attributed(self) -> float:
        """Share of the time in kernels whose module and op are known."""
        known = total = 0
        for step in self.steps:
            for span in step.spans:
                total += span.ended - span.began
                if self.parts[step.graph][span.kernel][span.part].attributed:
                    known += span.ended - span.began
        return known / max(total, 1)

    def table(self, by: By = "op", *, most: int = 20) -> Table:
        """:meth:`rows` for people, with rich; the ``most`` longest of each graph, and the rest in one row."""
        table = Table(title=self._title(by), title_justify="left")
        table.add_column("graph")
        table.add_column(by)
        for column in ("kernels", "us a step", "share"):
            table.add_column(column, justify="right")
        rows = self.rows(by)
        for graph in self.graphs:
            mine = [row for row in rows if row.graph == graph]
            shown, rest = mine[:most], mine[most:]
            if rest:
                name = f"({len(rest)} more)"
                shown.append(
                    Row(graph, name, *(sum(getattr(r, what) for r in rest) for what in ("calls", "us", "share")))
                )
            for row in shown:
                table.add_row(row.graph, row.name, f"{row.calls:g}", f"{row.us:,.1f}", f"{row.share:.1%}")
            table.add_section()
        return table

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def json(self) -> dict[str, Any]:
        """All of it, for :meth:`read` and for programs."""
        rows = {by: [asdict(row) for row in self.rows(by)] for by in ("op", "block", "place")}  # type: ignore[arg-type]
        return {"attributed": self.attributed(), "rows": rows, **asdict(self)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.json()))

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """The run that was written into ``folder``.

        Raises:
            ValueError: there is none, or it has no steps.
        """
        path = Path(folder) / "run.json"
        try:
            data = json.loads(path.read_text())
            run = cls(
                parts={graph: [_parts(k) for k in kernels] for graph, kernels in data.pop("parts").items()},
                steps=[Step(**{**step, "spans": [Span(**s) for s in step["spans"]]}) for step in data.pop("steps")],
                **{
                    name: data[name]
                    for name in ("model", "dtype", "device", "threads", "torch", "date", "limits", "build")
                },
            )
            if any(step.graph not in run.parts for step in run.steps):
                raise KeyError("a step of a graph without parts")
            if any(not run._has(step.graph, span) for step in run.steps for span in step.spans):
                raise KeyError("a span of a part that its graph lacks")
        except OSError as error:
            raise ValueError(f"run: want a directory that profile wrote, got {folder}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"run: want a directory that profile wrote, got {folder}: {error!r:.200}") from None
        if not run.steps:
            raise ValueError(f"run: want a trace with steps, got none in {path}")
        return run

    def _has(self, graph: str, span: Span) -> bool:
        kernels = self.parts[graph]
        return 0 <= span.kernel < len(kernels) and 0 <= span.part < len(kernels[span.kernel])

    def _times(self, step: Step, by: By) -> Iterator[tuple[str, int]]:
        if not self.parts[step.graph]:  # not compiled, as the optimizer's part of a training step
            yield f"({step.graph})", step.ended - step.began
            return
        for span in step.spans:
            yield _label(self.parts[step.graph][span.kernel][span.part], by), span.ended - span.began
        yield WRAPPER, step.wrapper_ns
        yield GUARDS, step.guard_ns

    def _title(self, by: By) -> str:
        medians = [
            f"{graph} {statistics.median(s.ended - s.began for s in self.steps_of(graph)) / 1e6:.2f} ms"
            f" ({len(self.steps_of(graph))} steps)"
            for graph in self.graphs
        ]
        return f"{self.model}, {self.dtype}, {self.device}, {self.threads} threads; " + ", ".join(medians)


def _label(part: Part, by: By) -> str:
    if by == "place":
        return part.name
    names = part.blocks if by == "block" else tuple(dict.fromkeys(site.op for site in part.own))
    return " + ".join(names) or part.name


def _parts(parts: list[dict[str, Any]]) -> list[Part]:
    sites = [{name: tuple(Site(**s) for s in part[name]) for name in ("own", "taken_in")} for part in parts]
    return [Part(part["kernel"], **s) for part, s in zip(parts, sites, strict=True)]
