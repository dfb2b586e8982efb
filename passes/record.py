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
KINDS: tuple[Kind, ...] = ("exact", "reassociating")


@dataclass(frozen=True, slots=True)
class Pass:
    """One rewrite of the graph.

    Attributes:
        name: of the function; of a rule's class, in lower case with underscores.
        stage: where it runs; see the design of the pipeline in ``passes/pipeline.py``.
        kind: what it does to values.
        fn: rewrites the graph in place and returns the number of rewrites. Keyword-only parameters are settings,
            which the pipeline fills in by name; one that it does not have keeps its default.
        saves: what it saves, in words: bytes or launches.
        rule: the :class:`~deepfuse.passes.fusion.Rule` a fusion was declared as; ``None`` for a plain function.
    """

    name: str
    stage: Stage
    kind: Kind
    fn: Callable[..., int]
    saves: str = ""
    rule: Any = None

    @property
    def declared(self) -> Any:
        """The function or class that was decorated."""
        return self.fn if self.rule is None else self.rule.declared

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        text = inspect.getdoc(inspect.getmodule(self.declared)) or inspect.getdoc(self.declared)
        return (text or "").partition("\n")[0]

    @property
    def settings(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    def source_hash(self) -> str:
        """Of the whole file the pass stands in, so that editing a helper counts as editing the pass."""
        try:
            source = inspect.getsource(inspect.getmodule(self.declared) or self.declared).encode()
        except (OSError, TypeError):  # typed into a prompt or a notebook: there is no file, but there is the code
            source = _code(self.declared).encode()
        return hashlib.sha256(source).hexdigest()

    def __call__(self, graph: fx.Graph, **settings: Any) -> int:
        return self.fn(graph, **{name: settings[name] for name in self.settings if name in settings})


def _code(declared: Any) -> str:
    """What a function, or each member of a class, is made of."""
    if inspect.isclass(declared):
        members = {k: getattr(declared, k) for k in vars(declared) if not k.startswith("__")}
        return repr([(name, _code(v) if inspect.isfunction(v) else repr(v)) for name, v in sorted(members.items())])
    code = declared.__code__
    # code of nested functions prints its address, which changes from run to run
    constants = [c.co_code.hex() + repr(c.co_names) if inspect.iscode(c) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def graph_pass(*, stage: Stage, kind: Kind, saves: str = "") -> Callable[[Callable[..., int]], Pass]:
    """Declare a function to be a pass.

    Raises:
        ValueError: there is no such stage or class.
    """
    check_declaration("graph_pass", stage, kind)
    return lambda fn: Pass(fn.__name__, stage, kind, fn, saves)


def check_declaration(name: str, stage: str, kind: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"{name}: want stage out of {STAGES}, got {stage!r}")
    if kind not in KINDS:
        raise ValueError(f"{name}: want kind out of {KINDS}, got {kind!r}")
