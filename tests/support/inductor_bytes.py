"""What Inductor itself counts of the graphs that a function compiles to, and what we count of the same graphs.

Code is written and neither compiled nor run, so that a graph costs seconds. Inductor counts a tensor that fused
loops read by index (an embedding, the experts of a token) as if all of it were read; here what they look at is counted in
its place, as we do.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
from torch import fx

from deepfuse.ir.device import CPU
from deepfuse.ir.private import compile_inner, with_own_code
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.profiling.regions import Launch, launches


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one graph, in bytes.

    Attributes:
        inductor: its own count (what it adds to ``torch._inductor.metrics.num_bytes_accessed``).
        indexed: how much of that is of tensors read by index, beyond what is looked at.
        ours: of :func:`deepfuse.profiling.regions.launches`.
    """

    inductor: int
    indexed: int
    ours: list[Launch]

    @property
    def predicted(self) -> int:
        return sum(launch.activation_bytes + launch.weight_bytes for launch in self.ours)


class _NotRun(Exception):
    """Instead of calling code that was not compiled."""


def counted(fn: Callable[..., Any], *args: Any, training: bool = False) -> list[Counted]:
    """The graphs of ``fn``: one, or with ``training`` forward and backward."""
    from torch._inductor.graph import GraphLowering

    found: list[tuple[int, int]] = []
    ours: list[list[Launch]] = []

    def not_run(*args: Any) -> Any:
        raise _NotRun

    def only_count(self: Any) -> Any:
        self.codegen()
        self.cache_key = self.cache_path = ""
        size, _, _ = self.count_bytes()
        found.append((size, sum(_beyond_looked_at(self, node) for node in self.scheduler.nodes)))
        return SimpleNamespace(call=not_run, __file__="")

    def run(self: Runner, graph: fx.Graph, hook: str) -> None:
        rewrite(self, graph, hook)
        if hook == "last":
            ours.append(launches(graph, ()))

    rewrite = Runner.run
    runner = Runner(default(), {"providers": {}, "device": CPU, "max_seq_len": 256, "layout": ""}, strict=True)
    backend = functools.partial(compile_inner, options=runner.options() | {"force_disable_caches": True})
    torch._dynamo.reset()
    with (
        mock.patch.object(Runner, "run", run),
        mock.patch.object(GraphLowering, "compile_to_module", only_count),
        # numbers of launches are not asked for, and ops on a CPU may read values
        mock.patch("deepfuse.profiling.regions.count_kernels", lambda fn, args: [""]),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=training),
        contextlib.suppress(_NotRun),
    ):
        torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=backend)(*args)
    return [Counted(*counts, of_graph) for counts, of_graph in zip(found, ours, strict=True)]


def _beyond_looked_at(graph: Any, node: Any) -> int:
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.scheduler import SchedulerNode

    if isinstance(node, SchedulerNode):  # of a loop by itself it counts what is looked at; of loops together all
        return 0
    looked_at: dict[str, int] = {}
    for dep in node.read_writes.reads:
        if isinstance(dep, MemoryDep) and dep.is_indirect():
            looked_at[dep.name] = looked_at.get(dep.name, 0) + math.prod(map(int, dep.size))
    beyond = 0
    for name, elements in looked_at.items():
        beyond += max(int(graph.get_numel(name)) - elements, 0) * graph.get_dtype(name).itemsize
    return beyond
