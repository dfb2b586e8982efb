"""NVTX ranges of a model while a block runs, for a tool that listens, such as Nsight Systems; nothing is recorded here.

The first call of each graph is made twice: once without ranges, to find its code, and once with them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from deepfuse.ir.private import load_code
from deepfuse.passes.sites import Site
from deepfuse.profiling.graph_ranges import RangedGraph, graph_called_by
from deepfuse.profiling.instrument import code_called_by, replaced
from deepfuse.profiling.nvtx import Domain, Ranges, open_domain
from deepfuse.profiling.range_code import with_ranges
from deepfuse.runtime.compile_cache import inductor_cache
from deepfuse.runtime.engine import CudaGraph
from deepfuse.runtime.model import Model


@contextmanager
def ranged(model: Model, domain: Domain | None = None) -> Iterator[None]:
    """Inside, the graphs of a model have ranges, compiled or not.

    A decode step that replays a CUDA graph runs no Python, and would have none: its kernels are launched one by one.

    Args:
        domain: who takes them; NVTX where it is ``None``.

    Raises:
        RuntimeError: there is nothing to make NVTX ranges with.
    """
    domain = open_domain() if domain is None else domain
    with (
        ExitStack() as stack,
        model.engine.wrapped(lambda name, graph: _Ranged(name, graph, model, domain, stack)),
    ):
        yield


class _Ranged:
    """A graph of an engine with ranges."""

    def __init__(self, name: str, graph: Callable[..., Any], model: Model, domain: Domain, stack: ExitStack):
        self.graph = graph.launched if isinstance(graph, CudaGraph) else graph
        self.name, self.model, self.domain, self.stack = name, model, domain, stack
        self.ranges: Ranges | None = None

    def __call__(self, *args: Any) -> Any:
        if self.ranges is None:
            self.ranges = self._put_in(lambda: self.graph(*args))
        with self.ranges.of_a_call():
            return self.graph(*args)

    def _put_in(self, call: Callable[[], Any]) -> Ranges:
        sites = next(g.sites for g in self.model.report.journal.graphs if g.name == self.name)
        if self.model.report.compiled:
            owner, source, _ = code_called_by(call)
            ranges, in_place = code_with_ranges(owner, source, sites, self.domain, self.name)
        else:
            graph = RangedGraph(graph_called_by(call), sites, self.domain, self.name)
            ranges, in_place = graph.ranges, graph.in_place()
        self.stack.enter_context(in_place)
        return ranges


def code_with_ranges(
    owner: dict[str, Any], source: str, sites: Sequence[Site], domain: Domain, name: str
) -> tuple[Ranges, AbstractContextManager[None]]:
    """The ranges of a copy of a graph's code, and what puts that copy in the code's place."""
    text, found = with_ranges(source, sites)
    ranges = Ranges(domain, name, found)
    with inductor_cache():
        module = load_code(text)
    vars(module).update(deepfuse_push=ranges.push, deepfuse_pop=ranges.pop)
    return ranges, replaced(owner, module.call)
