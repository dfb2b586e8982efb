"""Run a pipeline over a graph: order, timing, clean-up, checks and the journal. Passes do none of this themselves."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from deepfuse.ir.printer import graph_text
from deepfuse.ir.private import inductor_options, uncompiled_backend
from deepfuse.ir.verify import verify
from deepfuse.passes.journal import GraphEntry, Journal, PassEntry, graph_name, noting
from deepfuse.passes.pipeline import Pipeline
from deepfuse.passes.record import Pass

HOOKS: Mapping[str, tuple[str, ...]] = {
    "joint": ("semantic", "quantize"),
    "partitioned": ("communicate",),
    "last": ("lower",),
}
"""Hook of the compiler -> stages that run there."""


class PassError(RuntimeError):
    """A pass failed; names it, and carries the graph it was given."""


@dataclass(slots=True)
class Runner:
    """A pipeline with its settings, and the journal it writes."""

    pipeline: Pipeline
    settings: Mapping[str, Any]
    journal: Journal = field(default_factory=Journal)
    salt: str = ""
    """Enters the compiler's cache key: a new one makes it compile, and so the passes run, anew."""

    def options(self) -> dict[str, Any]:
        """For ``torch.compile(options=...)``: hooks of this compilation only."""
        hooks = {hook: self._hook(hook) for hook in HOOKS}
        return inductor_options(hooks, self.pipeline.key(sorted(self.settings.items())) + self.salt)

    def backend(self) -> Callable[..., Any]:
        """For ``torch.compile(backend=...)``: the same rewrites, run without Inductor."""
        return uncompiled_backend(lambda hook, gm: self.run(gm.graph, hook))

    def _hook(self, hook: str) -> Callable[[fx.Graph], None]:
        return lambda graph: self.run(graph, hook)

    def run(self, graph: fx.Graph, hook: str) -> None:
        """Run the passes of a hook in order, in place."""
        entry = self._entry(hook)
        for p in self.pipeline.of_stages(*HOOKS[hook]):
            entry.passes.append(self._run_pass(p, graph, entry.snapshots))

    def _entry(self, hook: str) -> GraphEntry:
        # a training step has a joint graph, then a forward and a backward one; the first hook opens the entry
        if hook == "joint" or not self.journal.graphs:
            self.journal.graphs.append(GraphEntry(graph_name()))
        return self.journal.graphs[-1]

    def _run_pass(self, p: Pass, graph: fx.Graph, snapshots: dict[str, str]) -> PassEntry:
        before, ops_before = graph_text(graph), op_counts(graph)
        snapshots[f"before:{p.name}"] = before
        notes: list[str] = []
        start = time.perf_counter()
        try:
            with noting(notes):
                rewrites = p(graph, **self.settings)
            graph.eliminate_dead_code()
            verify(graph)
        except Exception as error:
            raise PassError(f"pass {p.name} failed: {error}\nthe graph it was given:\n{before}") from error
        milliseconds = (time.perf_counter() - start) * 1e3
        snapshots[f"after:{p.name}"] = graph_text(graph)
        changes = op_counts(graph)
        changes.subtract(ops_before)
        return PassEntry(
            p.name, p.stage, p.kind, rewrites, milliseconds, {k: v for k, v in sorted(changes.items()) if v}, notes
        )


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each op stands in the graph."""
    return Counter(
        str(n.target) if isinstance(n.target, torch._ops.OpOverload) else getattr(n.target, "__name__", str(n.target))
        for n in graph.nodes
        if n.op == "call_function"
    )
