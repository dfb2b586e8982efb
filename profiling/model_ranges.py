"""NVTX ranges of a model while a block runs, for a tool that listens, such as Nsight Systems; nothing is recorded here.

The first call of each graph of a generation is made twice: once without ranges, to find its code, and once with them. A
step of training changes what the next one starts from, so that the first has the ranges of its parts alone.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from deepfuse.ir.private import load_code
from deepfuse.profiling.graph_ranges import RangedGraph, graph_called_by
from deepfuse.profiling.instrument import code_called_by, replaced
from deepfuse.profiling.nvtx import Domain, Ranges, open_domain
from deepfuse.profiling.range_code import with_ranges
from deepfuse.runtime.compile_cache import inductor_cache
from deepfuse.runtime.cuda_graph import kernel_by_kernel
from deepfuse.runtime.model import Model
from deepfuse.runtime.module import CompiledModule
from deepfuse.runtime.trainer import Trainer

WITHOUT_GRAPHS = ("copy_weights", "optimizer")
"""Parts of a step of training that call no graph of ours."""


@contextmanager
def ranged(model: Model | Trainer | CompiledModule, domain: Domain | None = None) -> Iterator[None]:
    """Inside, the graphs of a model, of its training or of a module have ranges, compiled or not.

    A decode step that replays a CUDA graph runs no Python, and would have none: its kernels are launched one by one.

    Args:
        domain: who takes them; NVTX where it is ``None``.

    Raises:
        RuntimeError: there is nothing to make NVTX ranges with.
    """
    domain = open_domain() if domain is None else domain
    graphs: dict[str, _Ranged] = {}

    def of(name: str, compiled: bool) -> _Ranged:
        return graphs.setdefault(name, _Ranged(name, compiled, domain, stack))

    with ExitStack() as stack:
        if isinstance(model, Trainer):
            # ranges nest within a thread, and backward would have one of its own on a GPU
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            compiled = model.compiled
            stack.enter_context(model.wrapped(lambda name, part: of(name, compiled).step(part)))
        elif isinstance(model, CompiledModule):
            stack.enter_context(model.wrapped(of("forward", model.compiled).call))
        else:
            compiled = model.report.compiled

            def wrap(name: str, graph: Callable[..., Any]) -> Callable[..., Any]:
                launched = kernel_by_kernel(graph)
                return lambda *args: of(name, compiled).call(lambda: launched(*args))

            stack.enter_context(model.engine.wrapped(wrap))
        yield


class _Ranged:
    """A graph with ranges."""

    def __init__(self, name: str, compiled: bool, domain: Domain, stack: ExitStack):
        self.name, self.compiled, self.domain, self.stack = name, compiled, domain, stack
        self.ranges: Ranges | None = None

    def call(self, call: Callable[[], Any]) -> Any:
        """A call of the graph that may be made twice."""
        if self.ranges is None:
            self._put_in(call)
        assert self.ranges is not None
        with self.ranges.of_a_call():
            return call()

    def step(self, part: Callable[[], Any]) -> Any:
        """A part of a step, which is done once."""
        if self.ranges is not None or self.name in WITHOUT_GRAPHS:
            with (self.ranges or Ranges(self.domain, self.name, [])).of_a_call():
                return part()
        with Ranges(self.domain, self.name, []).of_a_call():
            return self._put_in(part)

    def _put_in(self, call: Callable[[], Any]) -> Any:
        in_place: AbstractContextManager[None]
        if self.compiled:
            owner, source, result = code_called_by(call)
            text, found = with_ranges(source)
            self.ranges = Ranges(self.domain, self.name, found)
            with inductor_cache():
                module = load_code(text)
            vars(module).update(deepfuse_push=self.ranges.push, deepfuse_pop=self.ranges.pop)
            in_place = replaced(owner, module.call)
        else:
            gm, result = graph_called_by(call)
            graph = RangedGraph(gm, self.domain, self.name)
            self.ranges, in_place = graph.ranges, graph.in_place()
        self.stack.enter_context(in_place)
        return result
