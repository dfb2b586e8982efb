"""What a pass is: a function ``graph -> number of rewrites`` with a name, a stage and a class.

exact          the rewritten graph gives bitwise the same values
reassociating  the same up to rounding, within ``ir``'s tolerances
"""

import contextlib
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Mapping
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
        """Of the whole file the pass stands in, so that editing a helper counts as editing the pass; and of what it was
        made with, by a function that makes passes."""
        try:
            source = inspect.getsource(inspect.getmodule(self.declared) or self.declared)
        except (OSError, TypeError):  # typed into a prompt or a notebook: there is no file, but there is the code
            source = _code(self.declared)
        return hashlib.sha256(f"{source}\n{_made_with(self.declared)}".encode()).hexdigest()

    def __call__(self, graph: fx.Graph, **settings: Any) -> int:
        return self.fn(graph, **{name: settings[name] for name in self.settings if name in settings})


def _code(declared: Any) -> str:
    """What a function, or each member of a class, is made of."""
    if inspect.isclass(declared):
        return repr([(name, _code(v) if inspect.isfunction(v) else _shown(v)) for name, v in _members(declared)])
    return _bytecode(declared.__code__)


def _bytecode(code: types.CodeType) -> str:
    # code of nested functions prints its address, which changes from run to run
    constants = [_bytecode(c) if inspect.iscode(c) else _shown(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def _made_with(declared: Any) -> str:
    """The values that a function closes over and its defaults; of a class, those of its functions and its other members."""
    if inspect.isclass(declared):
        return str([(name, _made_with(v) if inspect.isfunction(v) else _shown(v)) for name, v in _members(declared)])
    closed_over = []
    for cell in declared.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            closed_over.append(cell.cell_contents)
    return _shown([closed_over, declared.__defaults__, declared.__kwdefaults__])


def _members(declared: type) -> list[tuple[str, Any]]:
    return [(name, getattr(declared, name)) for name in sorted(vars(declared)) if not name.startswith("__")]


def _shown(value: Any) -> str:
    """The same text in every process: no addresses, and sets in order."""
    if inspect.isfunction(value):
        return _bytecode(value.__code__)
    if isinstance(value, Mapping):
        return str([(_shown(k), _shown(v)) for k, v in value.items()])
    if isinstance(value, set | frozenset):
        return str(sorted(map(_shown, value)))
    if isinstance(value, list | tuple):
        return str(list(map(_shown, value)))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


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
