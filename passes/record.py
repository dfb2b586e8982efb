"""What a pass is: a function ``graph -> number of rewrites`` with a name, a stage and a class.

exact          the rewritten graph gives bitwise the same values
reassociating  the same up to rounding, within ``ir``'s tolerances
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

Stage = Literal["semantic", "quantize", "communicate", "lower"]
Kind = Literal["exact", "reassociating"]
STAGES: tuple[Stage, ...] = ("semantic", "quantize", "communicate", "lower")


@dataclass(frozen=True, slots=True)
class Pass:
    """One rewrite of the graph.

    Attributes:
        name: of the function.
        stage: where it runs; see the design of the pipeline in ``passes/pipeline.py``.
        kind: what it does to values.
        fn: rewrites the graph in place and returns the number of rewrites. Keyword-only parameters are settings,
            which the pipeline fills in by name.
    """

    name: str
    stage: Stage
    kind: Kind
    fn: Callable[..., int]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(inspect.getmodule(self.fn)) or inspect.getdoc(self.fn) or "").partition("\n")[0]

    @property
    def settings(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    def source_hash(self) -> str:
        """Of the whole file the pass stands in, so that editing a helper counts as editing the pass."""
        try:
            source = inspect.getsource(inspect.getmodule(self.fn) or self.fn).encode()
        except (OSError, TypeError):  # typed into a prompt or a notebook: there is no file, but there is the code
            source = self.fn.__code__.co_code + repr((self.fn.__code__.co_consts, self.fn.__code__.co_names)).encode()
        return hashlib.sha256(source).hexdigest()

    def __call__(self, graph: fx.Graph, **settings: Any) -> int:
        return self.fn(graph, **{name: settings[name] for name in self.settings})


def graph_pass(*, stage: Stage, kind: Kind) -> Callable[[Callable[..., int]], Pass]:
    """Declare a function to be a pass."""
    if stage not in STAGES:
        raise ValueError(f"graph_pass: want stage out of {STAGES}, got {stage!r}")
    return lambda fn: Pass(fn.__name__, stage, kind, fn)
