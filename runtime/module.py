"""Any module, compiled with the passes: a single block, or somebody else's model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from deepfuse.ir.device import device_row
from deepfuse.ir.private import with_own_code
from deepfuse.passes.journal import Journal
from deepfuse.passes.pipeline import Pipeline
from deepfuse.passes.runner import Runner
from deepfuse.runtime.compile_cache import inductor_cache


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # by this name Dynamo leaves the module itself out of the paths of its parts
    return self(*args, **kwargs)


class CompiledModule(nn.Module):
    """Calls the module; its graphs are compiled at the first call, as for ``torch.compile``."""

    def __init__(
        self,
        module: nn.Module,
        pipeline: Pipeline,
        providers: Mapping[str, str],
        *,
        compile: bool,
        how: Mapping[str, Any],
    ):
        """``how``: what else the :class:`Runner` is told."""
        super().__init__()
        self.module = module
        parameter = next(module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        settings = {"providers": dict(providers), "device": device_row(device), "max_seq_len": 4096}
        self.runner = Runner(pipeline, settings, **how)
        self.compiled, self.device = compile, device
        self._caching: Callable[[], AbstractContextManager[None]] = inductor_cache if compile else nullcontext
        backend = self.runner.inductor() if compile else self.runner.backend()
        self._compiled = torch.compile(with_own_code(_call), fullgraph=True, backend=backend)
        self._around: Callable[[Callable[[], Any]], Any] = lambda call: call()
        self._trial: Any = None
        if compile and self.runner.verify:
            trial = Runner(pipeline, settings, **how)
            self._trial = torch.compile(with_own_code(_call), fullgraph=True, backend=trial.backend())

    @property
    def journal(self) -> Journal:
        """What the passes did to the graphs so far."""
        return self.runner.journal

    def explain(self, name: str) -> str:
        """What a pass did at each of its sites, graph by graph: rewritten, or why not."""
        return self.journal.explain(name)

    def graph(self, stage: str, name: str | None = None) -> str:
        """A graph as runnable Python: ``before:PASS`` or ``after:PASS``."""
        return self.journal.graph(stage, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._caching():
            if self._trial is not None:
                with torch.no_grad():
                    self._trial(self.module, *args, **kwargs)
                self._trial = None
            return self._around(lambda: self._compiled(self.module, *args, **kwargs))

    @contextmanager
    def wrapped(self, around: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
        """Inside, ``around`` is given each call of the graph, and must make it."""
        before, self._around = self._around, around
        try:
            yield
        finally:
            self._around = before
