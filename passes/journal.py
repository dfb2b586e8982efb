"""What the passes did to each graph: the part of the report that is written while a graph is compiled."""

import contextlib
import difflib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

from deepfuse.passes.sites import Site


@dataclass(slots=True)
class PassEntry:
    """One run of one pass."""

    name: str
    stage: str
    kind: str
    rewrites: int
    milliseconds: float
    op_changes: dict[str, int]
    """Op -> how many more (or fewer) of it stand in the graph."""
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    """The error of a pass that failed; what it did was undone."""


@dataclass(slots=True)
class GraphEntry:
    """One graph that went through the passes."""

    name: str
    passes: list[PassEntry] = field(default_factory=list)
    snapshots: dict[str, str] = field(default_factory=dict)
    """``before:PASS`` and ``after:PASS`` -> the graph as runnable Python."""
    sites: list[Site] = field(default_factory=list)
    """Where the nodes of the lowered graph come from, by the numbers in its code."""
    collectives: list[tuple[str, str, str]] = field(default_factory=list)
    """Op, process group, module and dtype of each, in the order in which they are issued."""


@dataclass(slots=True)
class Journal:
    """All graphs of one build, in the order they were compiled."""

    graphs: list[GraphEntry] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """One line for each pass of each graph that rewrote something, or failed."""
        lines = [
            f"{graph.name}: {p.name}: "
            + (f"failed and was undone: {p.failure}" if p.failure else f"{p.rewrites} rewrites")
            for graph in self.graphs
            for p in graph.passes
            if p.rewrites or p.failure
        ]
        return "\n".join(lines) or "no rewrites"

    def graph(self, stage: str, name: str | None = None) -> str:
        """A graph as runnable Python.

        Args:
            stage: ``before:PASS`` or ``after:PASS``.
            name: ``prefill``, ``decode_1``, ...; ``None`` takes the first graph that has the stage.

        Raises:
            ValueError: there is no such graph or stage.
        """
        for entry in self.graphs:
            if (name is None or entry.name == name) and stage in entry.snapshots:
                return entry.snapshots[stage]
        stages = sorted({s for g in self.graphs for s in g.snapshots})
        names = [g.name for g in self.graphs]
        raise ValueError(f"graph: want a stage out of {stages} of a graph out of {names}, got {stage!r} of {name!r}")

    def explain(self, name: str) -> str:
        """What a pass did at each of its sites, graph by graph.

        Raises:
            ValueError: no pass of that name ran.
        """
        lines = []
        for graph in self.graphs:
            for entry in graph.passes:
                if entry.name == name:
                    lines.append(f"{graph.name}: {entry.rewrites} rewrites")
                    if entry.failure:
                        lines.append(f"    failed and was undone: {entry.failure}")
                    lines += [f"    {note}" for note in entry.notes]
        if not lines:
            known = sorted({e.name for g in self.graphs for e in g.passes})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise ValueError(f"explain: want a pass out of {', '.join(near)}, got {name!r}")
        return "\n".join(lines)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Journal":
        return cls(
            [
                GraphEntry(
                    g["name"],
                    [PassEntry(**p) for p in g["passes"]],
                    g["snapshots"],
                    [Site(**s) for s in g["sites"]],
                    [(op, group, of) for op, group, of in g["collectives"]],
                )
                for g in data["graphs"]
            ]
        )


_graph_name: ContextVar[str] = ContextVar("graph_name", default="graph")
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Graphs compiled inside are entered under this name."""
    token = _graph_name.set(name)
    try:
        yield
    finally:
        _graph_name.reset(token)


def graph_name() -> str:
    return _graph_name.get()


@contextlib.contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    token = _notes.set(notes)
    try:
        yield
    finally:
        _notes.reset(token)


def note(text: str) -> None:
    """Enter a line into the report of the running pass; outside of a pipeline it goes nowhere."""
    notes = _notes.get()
    if notes is not None:
        notes.append(text)
