"""What the passes did to each graph: the part of the report that is written while a graph is compiled."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any


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


@dataclass(slots=True)
class GraphEntry:
    """One graph that went through the passes."""

    name: str
    passes: list[PassEntry] = field(default_factory=list)
    snapshots: dict[str, str] = field(default_factory=dict)
    """``before:PASS`` and ``after:PASS`` -> the graph as runnable Python."""


@dataclass(slots=True)
class Journal:
    """All graphs of one build, in the order they were compiled."""

    graphs: list[GraphEntry] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Journal":
        graphs = [GraphEntry(g["name"], [PassEntry(**p) for p in g["passes"]], g["snapshots"]) for g in data["graphs"]]
        return cls(graphs)


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
