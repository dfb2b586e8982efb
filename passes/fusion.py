"""``@fusion``: a rewrite declared as a pattern and what to put in its place.

    @fusion(stage="semantic", saves="one write and one read of x")
    class FuseAddNorm:
        def pattern(x, residual, weight, eps): ...        the plain ops
        def replacement(x, residual, weight, eps): ...    the fused op
        def guard(site): ...                              None, or the reason why not (may be left out)
        samples = [("bfloat16[3, 128]", "bfloat16[3, 128]", "bfloat16[128]", 1e-6)]

The samples (see ``passes/samples.py``) say what the rule is proved on, and so what it applies to: their dtypes, and
their values of parameters that are neither tensors nor floats. Other forms of the pattern are functions ``pattern_...``.
``anchor`` names the op a search begins at, where the first telling op of the pattern is not the best one. ``tolerance``
maps dtypes to bounds where ``ir``'s do not fit, with the reason beside it.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from deepfuse.ir.op import Op
from deepfuse.ir.printer import source_line, where
from deepfuse.ir.private import inductor_decompositions
from deepfuse.ir.tolerance import Tolerance
from deepfuse.passes.journal import note
from deepfuse.passes.match import VIEWS, Found, Miss, Traced, match, op_name
from deepfuse.passes.record import Kind, Pass, Stage, check_declaration
from deepfuse.passes.samples import materialized
from deepfuse.passes.splice import Splicer, fake_mode_of

aten = torch.ops.aten
_NAMES = """
add radd iadd sub rsub mul rmul div truediv rtruediv neg clone contiguous copy to to_copy type float half bfloat16 double
convert_element_type get getitem view reshape flatten unflatten permute transpose t swapaxes movedim expand expand_as
unsqueeze squeeze narrow select slice split chunk unbind size shape
"""
_COMMON = frozenset(_NAMES.split())
"""What stands everywhere: no search begins there. Names of ops, and of the functions that call them."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place the pattern was found at, as a guard sees it: ``site.x`` is the (fake) tensor or number of parameter x.

    Attributes:
        nodes: parameter -> node of the graph, for tensors.
        values: parameter -> fake tensor, number or other value.
        outputs: the nodes that the replacement replaces.
        matched: all nodes of the graph that belong to the pattern.
    """

    nodes: Mapping[str, fx.Node]
    values: Mapping[str, Any]
    outputs: tuple[fx.Node, ...]
    matched: tuple[fx.Node, ...]

    def __getattr__(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        raise AttributeError(f"site: want a parameter out of {sorted(self.values)}, got {name!r}")


@dataclass(frozen=True, slots=True)
class _Form:
    """One pattern function traced for one sample."""

    pattern: Callable[..., Any]
    traced: Traced
    dtypes: Mapping[str, torch.dtype]
    constants: Mapping[str, Any]


class Rule:
    """A declared fusion; :meth:`rewrite` is the function of its pass."""

    def __init__(self, declared: type, name: str, kind: Kind):
        self.declared, self.name, self.kind = declared, name, kind
        members = vars(declared)
        self.patterns = tuple(getattr(declared, n) for n in members if n == "pattern" or n.startswith("pattern_"))
        self.samples: list[tuple[Any, ...]] = list(getattr(declared, "samples", ()))
        self.tolerance: Mapping[torch.dtype, Tolerance] = getattr(declared, "tolerance", {})
        self.guard: Callable[[Site], str | None] = getattr(declared, "guard", lambda site: None)
        anchor = getattr(declared, "anchor", None)
        self.anchor = anchor.overload if isinstance(anchor, Op) else anchor
        for wanted in ("pattern", "replacement", "samples"):
            if not members.get(wanted):
                raise ValueError(f"{name}: want a class with pattern, replacement and samples, got no {wanted}")
        self.replacement: Callable[..., Any] = declared.replacement  # type: ignore[attr-defined]
        self.parameters = list(inspect.signature(self.patterns[0]).parameters)
        self._forms: list[_Form] | None = None
        self._check()

    @property
    def forms(self) -> list[_Form]:
        """The patterns, traced for each sample when they are first needed; the largest first."""
        if self._forms is None:
            made = [self._form(pattern, sample) for pattern in self.patterns for sample in self.samples]
            # samples that differ in sizes only have one form
            distinct = {f"{f.pattern} {_graph_key(f.traced)} {f.dtypes} {f.constants}": f for f in made}
            self._forms = sorted(distinct.values(), key=lambda f: -len(f.traced.calls))
        return self._forms

    def rewrite(self, graph: fx.Graph) -> int:
        """Replace every site, and say of every node with the anchor's op what became of it."""
        targets = list(dict.fromkeys(form.traced.anchor.target for form in self.forms))
        anchors = [node for node in graph.nodes if node.op == "call_function" and node.target in targets]
        splicer, traced, count = Splicer(graph, share=False), {}, 0  # type: ignore[var-annotated]
        gone: set[fx.Node] = set()
        for anchor in anchors:
            if anchor in gone:
                continue
            at = f"{op_name(anchor.target)} at {_place(anchor)}"
            site = self.find(anchor, traced)
            problem = site if isinstance(site, str) else self._replace(site, splicer)
            if problem is None:
                assert isinstance(site, Site)
                count += 1
                gone.update(_erase_dead(site.matched))
            note(f"{at}: {problem or 'matched'}")
        return count

    def find(self, anchor: fx.Node, traced: dict[str, Traced] | None = None) -> Site | str:
        """The site at a node with the anchor's op, or how far the match got and why it stopped.

        Args:
            traced: keeps patterns traced for the arguments of a site, for the next site like it.
        """
        best: tuple[float, str] = (-1.0, "")
        for form in self.forms:
            if form.traced.anchor.target is not anchor.target:
                continue
            found = match(form.traced, anchor, {}, exact=False)
            if isinstance(found, Miss):
                partly = 1 < found.reached < found.wanted
                far = f"{found.reached} of {found.wanted} nodes match; " if partly else ""
                best = max(best, (found.reached / found.wanted, far + found.reason), key=lambda b: b[0])
                continue
            site = self._site(form, found, anchor, {} if traced is None else traced)
            if isinstance(site, Site):
                return site
            best = max(best, site, key=lambda b: b[0])
        return best[1]

    def _site(self, form: _Form, found: Found, anchor: fx.Node, traced: dict[str, Traced]) -> Site | tuple[float, str]:
        """The site of a match in all but sizes; or how near it came (2 to 5) and why it is none."""
        nodes = {name: found.nodes[node] for name, node in form.traced.inputs.items()}
        values = {name: node.meta["val"] for name, node in nodes.items()}
        for name, value in values.items():
            if value.dtype != form.dtypes[name]:
                wanted = dict.fromkeys(str(f.dtypes[name]) for f in self.forms if name in f.dtypes)
                text = f"{name} has dtype {value.dtype}, rule wants {' or '.join(wanted)}"
                return 2.0, text.replace("torch.", "")
        arguments = {**values, **form.constants, **found.numbers}
        key = f"{form.pattern} {form.constants} {[(n, v.shape, v.stride(), v.dtype, v.device) for n, v in values.items()]}"
        if key not in traced:
            try:
                traced[key] = self._trace(form.pattern, arguments, fake_mode_of(anchor.graph))
            except Exception as error:  # noqa: BLE001 - shapes a pattern is not made for may raise anything in it
                return 3.0, f"the pattern does not take these arguments: {error}"
        fitted = traced[key]
        again = match(fitted, anchor, nodes, exact=True)
        if isinstance(again, Miss):
            return 4.0, f"sizes or numbers differ: {again.reason}"
        site = Site(
            nodes,
            {name: arguments[name] for name in self.parameters},
            tuple(again.nodes[output] for output in fitted.outputs),
            tuple(again.nodes[call] for call in fitted.calls),
        )
        reason = self.guard(site)
        return site if reason is None else (5.0, f"guard: {reason}")

    def _replace(self, site: Site, splicer: Splicer) -> str | None:
        """Put the replacement in; or the reason why it does not fit there."""
        matched = set(site.matched)
        users = [user for output in site.outputs for user in output.users if user not in matched]
        if not users:
            return "nobody reads the result"
        first = min(users)
        late = next((name for name, node in site.nodes.items() if not node < first), None)
        if late is not None:
            return f"{late} is computed after the result is read"
        arguments = [site.nodes.get(name, site.values[name]) for name in self.parameters]
        like = max(site.matched)
        new = splicer.splice(first, self.replacement, arguments, like)
        results = new if isinstance(new, list | tuple) else (new,)
        for old, fresh in zip(site.outputs, results, strict=True):
            a, b = _layout(old.meta["val"]), _layout(fresh.meta["val"])
            if a != b:
                return f"result is {a}, the replacement gives {b}"
        for old, fresh in zip(site.outputs, results, strict=True):
            old.replace_all_uses_with(fresh)
        return None

    def _form(self, pattern: Callable[..., Any], sample: tuple[Any, ...]) -> _Form:
        with FakeTensorMode() as mode:
            arguments = dict(zip(self.parameters, materialized(sample), strict=True))
        dtypes = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}
        constants = {n: v for n, v in arguments.items() if n not in dtypes and not isinstance(v, float)}
        return _Form(pattern, self._trace(pattern, arguments, mode), dtypes, constants)

    def _trace(self, pattern: Callable[..., Any], arguments: Mapping[str, Any], mode: Any) -> Traced:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        # a number that occurs nowhere else, and survives rounding, shows where the parameter went
        floats = {(187 + 2 * i) / 256: name for i, (name, v) in enumerate(arguments.items()) if isinstance(v, float)}
        numbers = {name: value for value, name in floats.items()}

        def on_tensors(*given: Tensor) -> Any:
            return pattern(**{**arguments, **numbers, **dict(zip(tensors, given, strict=True))})

        with mode:
            given = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors.values()]
            gm = traced(on_tensors, given)
        calls = tuple(node for node in gm.graph.nodes if node.op not in ("placeholder", "output"))
        inputs = dict(zip(tensors, (n for n in gm.graph.nodes if n.op == "placeholder"), strict=True))
        (result,) = next(n for n in gm.graph.nodes if n.op == "output").args
        outputs = tuple(result) if isinstance(result, list | tuple) else (result,)
        for name, node in inputs.items():
            node.target = name
            if not node.users:
                raise ValueError(f"{self.name}: want a pattern that uses its parameters, got one without use of {name}")
        if not all(isinstance(node, fx.Node) and node in calls for node in outputs):
            raise ValueError(f"{self.name}: want a pattern that computes what it returns, got {list(outputs)}")
        return Traced(inputs, floats, outputs, self._anchor(calls), calls)  # type: ignore[arg-type]

    def _anchor(self, calls: tuple[fx.Node, ...]) -> fx.Node:
        def fits(node: fx.Node) -> bool:
            if self.anchor is not None:
                return node.target is self.anchor
            name = op_name(node.target).strip("_")
            return node.target not in VIEWS and name not in _COMMON and not _gives_number(node)

        dialect = [n for n in calls if getattr(n.target, "namespace", "") == "deepfuse"] if self.anchor is None else []
        found = next((node for node in [*dialect, *calls] if fits(node)), None)
        if found is None:
            raise self._no_anchor([op_name(call.target) for call in calls])
        return found

    def _no_anchor(self, ops: list[str]) -> ValueError:
        wanted = "an op rarer than these" if self.anchor is None else op_name(self.anchor)
        return ValueError(f"{self.name}: want a pattern with an anchor to search for, {wanted}, got the ops {ops}")

    def _check(self) -> None:
        """What a registration refuses; on real zeros: torch imports for seconds before its first meta tensor."""
        for fn in (*self.patterns, self.replacement):
            if list(inspect.signature(fn).parameters) != self.parameters:
                raise ValueError(
                    f"{self.name}: want {fn.__name__} with the parameters {self.parameters} of the pattern, "
                    f"got {list(inspect.signature(fn).parameters)}"
                )
        for sample in self.samples:
            if len(sample) != len(self.parameters):
                raise ValueError(f"{self.name}: want samples of {self.parameters}, got {sample}")
            arguments = materialized(sample, zeros=True)
            want = _shapes(self.replacement(*arguments))
            for pattern in self.patterns:
                with _Recorded() as seen:
                    got = _shapes(pattern(*arguments))
                if self.anchor is None and seen.names <= _COMMON:
                    raise self._no_anchor(sorted(seen.names - {"get"}))
                if got != want:
                    raise ValueError(
                        f"{self.name}: want a replacement that gives what the {pattern.__name__} gives, {got}, got {want}, "
                        f"for {sample}"
                    )


class _Recorded(TorchFunctionMode):
    """Names of the functions called. A dispatch mode would see ops, but imports Dynamo for that."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0].strip("_"))
        return func(*args, **(kwargs or {}))


def fusion(*, stage: Stage, saves: str, kind: Kind = "exact") -> Callable[[Any], Pass]:
    """Declare a rule (a class, see above) or a plain function ``graph -> number of rewrites`` to be a pass.

    Args:
        stage: where it runs.
        saves: what it saves, in words.
        kind: ``exact`` (bitwise) or ``reassociating`` (within ``ir``'s tolerances).

    Raises:
        ValueError: an unknown stage or class; a rule without pattern, replacement or samples; one whose replacement has
            other parameters, shapes, dtypes or another number of results than its pattern; one without an anchor.
    """
    check_declaration("fusion", stage, kind)

    def declare(declared: Any) -> Pass:
        if not inspect.isclass(declared):
            return Pass(declared.__name__, stage, kind, declared, saves)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", declared.__name__).lower()
        rule = Rule(declared, name, kind)
        return Pass(name, stage, kind, rule.rewrite, saves, rule)

    return declare


def traced(fn: Callable[..., Any], given: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of a function as passes see it: functional, and after Inductor's decompositions."""
    gm = make_fx(fn, decomposition_table=dict(inductor_decompositions()))(*given)
    for node in gm.graph.nodes:
        # torch writes some of its own functions in place; a graph that is compiled has been made functional
        if isinstance(node.target, torch._ops.OpOverload) and re.search("[^_]_$", node.target._opname):
            packet = getattr(getattr(torch.ops, node.target.namespace), node.target._opname.rstrip("_"))
            node.target = getattr(packet, node.target._overloadname)
    gm.graph.eliminate_dead_code()
    return gm


def _place(node: fx.Node) -> str:
    line = source_line(node)
    return f"{where(node)} ({line})" if line else where(node)


def _erase_dead(nodes: tuple[fx.Node, ...]) -> Iterator[fx.Node]:
    """Erase those that nobody reads; what is left of a site must not be found again."""
    for node in sorted(nodes, reverse=True):
        if not node.users:
            node.graph.erase_node(node)
            yield node


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    # the stride of a dimension of size one says nothing
    strides = [str(st) for st, size in zip(value.stride(), value.shape, strict=True) if not _is_one(size)]
    return f"{str(value.dtype).removeprefix('torch.')}{[str(s) for s in value.shape]} with strides {strides}"


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _shapes(result: Any) -> list[str]:
    results = result if isinstance(result, list | tuple) else (result,)
    return [f"{str(r.dtype).removeprefix('torch.')}{list(r.shape)}" for r in results]


def _gives_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def _graph_key(traced: Traced) -> str:
    return "\n".join(f"{n} {n.target} {n.args if n.op != 'placeholder' else ''} {n.kwargs}" for n in traced.calls)
