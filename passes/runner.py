"""Run a pipeline over a graph: order, timing, clean-up, checks and the journal. Passes do none of this themselves."""

import functools
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from deepfuse.ir.printer import graph_text
from deepfuse.ir.private import compile_inner, inductor_options, on_code, uncompiled_backend
from deepfuse.ir.verify import Known, verify, verify_types
from deepfuse.passes.check_values import Rewritten, copied
from deepfuse.passes.collective_order import Call, issued, issued_in
from deepfuse.passes.emitted_order import Flight, undone
from deepfuse.passes.journal import GraphEntry, Journal, PassEntry, graph_name, noting
from deepfuse.passes.overlap_all_to_all import overlap_all_to_all
from deepfuse.passes.pin_order import pin_order
from deepfuse.passes.pipeline import Pipeline
from deepfuse.passes.record import Pass
from deepfuse.passes.rollback import snapshot
from deepfuse.passes.sites import number_sites

HOOKS: Mapping[str, tuple[str, ...]] = {
    "joint": ("semantic", "quantize"),
    "partitioned": ("communicate",),
    "last": ("lower",),
}
"""Hook of the compiler -> stages that run there."""


class PassError(RuntimeError):
    """A pass failed; names it, and carries the graph it was given."""


CHECKED_CALLS = 3
"""Of each graph, where values are verified: an engine tries a graph out when it is made, with nothing in it."""


def strict_by_default() -> bool:
    """Whether a failing pass stops the compilation where the caller does not say: as ``DEEPFUSE_STRICT`` has it."""
    return os.environ.get("DEEPFUSE_STRICT", "0") not in ("", "0")


@dataclass(slots=True)
class Runner:
    """A pipeline with its settings, and the journal it writes."""

    pipeline: Pipeline
    settings: Mapping[str, Any]
    journal: Journal = field(default_factory=Journal)
    salt: str = ""
    """Enters the compiler's cache key: a new one makes it compile, and so the passes run, anew."""
    strict: bool = field(default_factory=strict_by_default)
    """Whether a pass that fails raises; otherwise what it did is undone, and the report says so."""
    dumps: Path | None = None
    """Folder for the graphs that passes failed on."""
    verify: bool = False
    """Whether types are checked after every pass, and values in the first calls of :meth:`backend`'s graphs."""
    meet: Callable[[str, list[Call]], None] | None = None
    """Called with a graph's name and collectives when it is compiled, before any of them runs: where others have the same."""
    _rewritten: list[Rewritten] = field(default_factory=list)

    def key(self) -> str:
        """Of all that decides how graphs are rewritten: the passes, their settings, and what failures lead to."""
        return self.pipeline.key((sorted(self.settings.items()), self.strict))

    def options(self) -> dict[str, Any]:
        """For ``torch.compile(options=...)``: hooks of this compilation only."""
        hooks = {hook: self._hook(hook) for hook in HOOKS}
        return inductor_options({**hooks, "last": self._last}, self.key() + self.salt)

    def backend(self) -> Callable[..., Any]:
        """For ``torch.compile(backend=...)``: the same rewrites, run without Inductor."""
        together = self.meet is not None
        return uncompiled_backend(lambda hook, gm: self.run(gm.graph, hook), self._finished, at_once=together)

    def inductor(self) -> Callable[..., Any]:
        """For ``torch.compile(backend=...)``: Inductor, with the rewrites in it."""
        heard = None if self.meet is None else lambda source: self._met(issued_in(source))
        return functools.partial(compile_inner, options=self.options(), heard=heard)

    def _met(self, calls: list[Call]) -> None:
        assert self.meet is not None
        self.meet(graph_name(), calls)

    def _finished(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        if self.meet is not None:
            self._met(self.journal.graphs[-1].collectives)
        return self._checked(fn) if self.verify else fn

    def _checked(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A graph whose first calls compare the values before and after each of its passes."""
        pending, self._rewritten = self._rewritten, []
        calls = 0

        def run(*inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls <= CHECKED_CALLS:
                for rewritten in pending:
                    problem = rewritten.problem(inputs)
                    if problem is not None:
                        before = graph_text(rewritten.before.graph)
                        raise PassError(
                            f"pass {rewritten.name} ({rewritten.kind}) changes values: {problem}\n"
                            f"the graph it was given:\n{before}"
                        )
            else:
                pending.clear()
            return fn(*inputs)

        return run

    def _hook(self, hook: str) -> Callable[[fx.Graph], None]:
        return lambda graph: self.run(graph, hook)

    def _last(self, graph: fx.Graph) -> None:
        self.run(graph, "last")
        # wrapped calls are no ops of any dialect: nothing of ours may come after it
        flights = pin_order(graph)
        entry = self.journal.graphs[-1]
        if entry.collectives:
            on_code(graph, lambda source: _note_order(entry, source, flights))

    def run(self, graph: fx.Graph, hook: str) -> None:
        """Run the passes of a hook in order, in place."""
        entry = self._entry(hook)
        text = graph_text(graph)
        known: Known = {}
        for p in self.pipeline.of_stages(*HOOKS[hook]):
            passed, text = self._run_pass(p, graph, text, entry.snapshots, known)
            entry.passes.append(passed)
        if hook == "last":
            entry.sites = number_sites(graph)
            entry.collectives = issued(entry.sites)

    def _entry(self, hook: str) -> GraphEntry:
        # a training step has a joint graph, then a forward and a backward one; the first hook opens the entry
        if hook == "joint" or not self.journal.graphs:
            self.journal.graphs.append(GraphEntry(graph_name()))
        return self.journal.graphs[-1]

    def _run_pass(
        self, p: Pass, graph: fx.Graph, before: str, snapshots: dict[str, str], known: Known
    ) -> tuple[PassEntry, str]:
        """The pass's entry, and the graph as it leaves it, printed; ``before`` is the graph as it is."""
        ops_before, calls_before = op_counts(graph), _calls(graph)
        snapshots[f"before:{p.name}"] = before
        notes: list[str] = []
        restore = snapshot(graph)
        original = copied(graph) if self.verify else None
        start = time.perf_counter()
        rewrites, failure, changed = 0, "", True
        try:
            with noting(notes):
                rewrites = _count(p(graph, **self.settings))
            # the count is the pass's own word
            changed = graph.eliminate_dead_code() or rewrites > 0 or _calls(graph) != calls_before
            if changed:
                # it asks the shape rule of every op, which takes longer than a pass that finds nothing
                verify(graph, known)
            if original is not None:
                verify_types(graph)
                if changed:
                    self._rewritten.append(Rewritten(p.name, p.kind, rewrites, original, copied(graph)))
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            if self.strict:
                raise PassError(f"pass {p.name} failed: {error}\nthe graph it was given:\n{before}") from error
            self._report_failure(p, before, graph, failure)
            restore()
            rewrites = 0
        milliseconds = (time.perf_counter() - start) * 1e3
        # printing takes longer than a pass that finds nothing
        after = snapshots[f"after:{p.name}"] = graph_text(graph) if changed else before
        changes = op_counts(graph)
        changes.subtract(ops_before)
        op_changes = {k: v for k, v in sorted(changes.items()) if v}
        return PassEntry(p.name, p.stage, p.kind, rewrites, milliseconds, op_changes, notes, failure), after

    def _report_failure(self, p: Pass, before: str, graph: fx.Graph, failure: str) -> None:
        """A file with the error and both graphs, and a warning that names it."""
        where = ""
        if self.dumps is not None:
            path = self.dumps / f"{graph_name()}-{p.name}.py"
            quoted = "".join(f"# {line}\n" for line in traceback.format_exc().splitlines())
            # what it left may be no graph that can be printed as Python
            left = "".join(f"# {line}\n" for line in str(graph).splitlines())
            self.dumps.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{quoted}\n# the graph {p.name} was given:\n{before}\n# what it left:\n{left}")
            where = f"; the graph that broke it: {path}"
        warnings.warn(f"pass {p.name} failed and was undone: {failure}{where}", stacklevel=2)


def _note_order(entry: GraphEntry, source: str, flights: list[Flight]) -> None:
    """Say in the report what order Inductor has made, and whether it is the one that was asked for."""
    entry.collectives = issued_in(source)
    if not flights:
        return
    of_pass = next((p for p in reversed(entry.passes) if p.name == overlap_all_to_all.name), None)
    assert of_pass is not None
    problems = undone(source, flights)
    of_pass.notes += [f"undone by Inductor: {problem}" for problem in problems]
    if not problems:
        kernels = sum(len(flight.under) for flight in flights)
        of_pass.notes.append(f"in the code: {len(flights)} transfers, {kernels} kernels between their starts and waits")


def _count(returned: Any) -> int:
    if not isinstance(returned, int) or returned < 0:
        raise TypeError(f"want a pass that returns how many rewrites it made, got {returned!r:.80}")
    return returned


def _calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph computes, to be compared with what it computes later; printing it takes longer."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each op stands in the graph."""
    return Counter(
        str(n.target) if isinstance(n.target, torch._ops.OpOverload) else getattr(n.target, "__name__", str(n.target))
        for n in graph.nodes
        if n.op == "call_function"
    )
