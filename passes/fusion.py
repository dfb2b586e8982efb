"""``@fusion``: a rewrite declared as a pattern and what to put in its place.

    @fusion(stage="semantic", saves="one write and one read of x")
    class FuseAddNorm:
        def pattern(x, residual, weight, eps): ...        the plain ops
        def replacement(x, residual, weight, eps): ...    the fused op
        def guard(site): ...                              None, or the reason why not (may be left out)
        samples = [("bfloat16[3, 128]", "bfloat16[3, 128]", "bfloat16[128]", 1e-6)]

The samples (see ``passes/samples.py``) say what the rule is proved on, and so what it applies to: their dtypes, and
their values of parameters that are neither tensors nor floats; ``free = ("num_experts",)`` names ints that may have any
value. Other forms of the pattern are functions ``pattern_NAME``; one that gives other results or takes other parameters
has its own ``replacement_NAME``, and ``samples_NAME`` for these. ``anchor`` names the op a search begins at, where the
first telling op of the pattern is not the best one. ``shared`` names ops inside the pattern whose results others may
read as well: they stay for these. ``tolerance`` maps dtypes to bounds where ``ir``'s do not fit, with the reason beside
it.

Of several forms the largest is tried first, and of equally large ones that with the fewest results: it asks for the most.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from deepfuse.ir.op import NAMESPACE, Op
from deepfuse.ir.printer import source_line, where
from deepfuse.ir.tolerance import Tolerance
from deepfuse.passes.declaration import COMMON, Case, cases_of, no_anchor
from deepfuse.passes.journal import note
from deepfuse.passes.match import VIEWS, Found, Miss, Traced, match, op_name
from deepfuse.passes.record import Kind, Pass, Stage, check_declaration
from deepfuse.passes.samples import dtypes_of, materialized
from deepfuse.passes.splice import Splicer, erase_dead, fake_mode_of
from deepfuse.passes.trace import trace

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Site:
    """A place the pattern was found at, as a guard sees it: ``site.x`` is the (fake) tensor or number of parameter x.

    Attributes:
        nodes: parameter -> node of the graph, for tensors.
        values: parameter -> fake tensor, number or other value.
        outputs: the nodes that the replacement replaces; ``None`` for one of several results that nobody reads.
        matched: all nodes of the graph that belong to the pattern.
        replacement: what is put in their place.
    """

    nodes: Mapping[str, fx.Node]
    values: Mapping[str, Any]
    outputs: tuple[fx.Node | None, ...]
    matched: tuple[fx.Node, ...]
    replacement: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        raise AttributeError(f"site: want a parameter out of {sorted(self.values)}, got {name!r}")


@dataclass(frozen=True, slots=True)
class _Form:
    """One pattern function traced for one sample."""

    case: Case
    traced: Traced
    dtypes: Mapping[str, torch.dtype]
    constants: Mapping[str, Any]


class Rule:
    """A declared fusion; :meth:`rewrite` is the function of its pass."""

    def __init__(self, declared: type, name: str, kind: Kind):
        self.declared, self.name, self.kind = declared, name, kind
        self.tolerance: Mapping[torch.dtype, Tolerance] = getattr(declared, "tolerance", {})
        self.guard: Callable[[Site], str | None] = getattr(declared, "guard", lambda site: None)
        self.free: tuple[str, ...] = tuple(getattr(declared, "free", ()))
        anchor = getattr(declared, "anchor", None)
        self.anchor = anchor.overload if isinstance(anchor, Op) else anchor
        self.shared = frozenset(op.overload if isinstance(op, Op) else op for op in getattr(declared, "shared", ()))
        self.cases = cases_of(declared, name, self.anchor, self.free)
        self._made: dict[tuple[Any, int], _Form] = {}

    @property
    def forms(self) -> list[_Form]:
        """The patterns, traced for each sample when they are first needed; the largest first."""
        return self._forms(lambda case: case.samples)

    def _forms(self, samples: Callable[[Case], Sequence[tuple[Any, ...]]]) -> list[_Form]:
        made = [self._form(case, sample) for case in self.cases for sample in samples(case)]
        # samples that differ in sizes only have one form
        distinct = {f"{f.case.pattern} {_graph_key(f.traced)} {f.dtypes} {f.constants}": f for f in made}
        return sorted(distinct.values(), key=lambda f: (-len(f.traced.calls), len(f.traced.outputs)))

    def _forms_for(self, graph: fx.Graph) -> list[_Form]:
        """Those of dtypes that the graph has; all of a case that has none such, to say what it wants."""
        values = (value for node in graph.nodes for value in tree_leaves(node.meta.get("val")))
        there = {value.dtype for value in values if isinstance(value, Tensor)}
        return self._forms(lambda case: [s for s in case.samples if dtypes_of(s) <= there] or case.samples)

    def rewrite(self, graph: fx.Graph) -> int:
        """Replace every site, and say of every node with the anchor's op what became of it."""
        lacking = self._lacking(graph)
        if lacking:
            note(f"nothing to do: the graph has no {lacking}")
            return 0
        forms = self._forms_for(graph)
        targets = list(dict.fromkeys(form.traced.anchor.target for form in forms))
        anchors = [node for node in graph.nodes if node.op == "call_function" and node.target in targets]
        splicer, traced, count = Splicer(graph, share=False), {}, 0  # type: ignore[var-annotated]
        gone: set[fx.Node] = set()
        for anchor in anchors:
            if anchor in gone:
                continue
            at = f"{op_name(anchor.target)} at {_place(anchor)}"
            site = self._find(anchor, forms, traced)
            problem = site if isinstance(site, str) else self._replace(site, splicer)
            if problem is None:
                assert isinstance(site, Site)
                count += 1
                gone.update(erase_dead(site.matched))
            note(f"{at}: {problem or 'matched'}")
        return count

    def _lacking(self, graph: fx.Graph) -> str:
        """The ops of ours that the graph lacks for the pattern; empty where it has those of one. Patterns are not traced."""
        overloads = (node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))
        there = {target._opname for target in overloads if target.namespace == NAMESPACE}
        lacking = [sorted(case.ops - there) for case in self.cases]
        return " and no ".join(lacking[0]) if all(lacking) else ""

    def _find(self, anchor: fx.Node, forms: Sequence[_Form], traced: dict[str, Traced]) -> Site | str:
        """The site at a node with the anchor's op, or how far the match got and why it stopped.

        Args:
            traced: keeps patterns traced for the arguments of a site, for the next site like it.
        """
        best: tuple[float, str] = (-1.0, "")
        for form in forms:
            if form.traced.anchor.target is not anchor.target:
                continue
            found = match(form.traced, anchor, {}, exact=False)
            if isinstance(found, Miss):
                partly = 1 < found.reached < found.wanted
                far = f"{found.reached} of {found.wanted} nodes match; " if partly else ""
                best = max(best, (found.reached / found.wanted, far + found.reason), key=lambda b: b[0])
                continue
            site = self._site(form, found, anchor, traced)
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
                same = (f for f in self.forms if f.traced.anchor.target is anchor.target and name in f.dtypes)
                wanted = dict.fromkeys(str(f.dtypes[name]) for f in same)
                text = f"{name} has dtype {value.dtype}, rule wants {' or '.join(wanted)}"
                return 2.0, text.replace("torch.", "")
        arguments = {**values, **form.constants, **found.numbers}
        free = {name: value for name, value in found.numbers.items() if name in self.free}
        key = f"{form.case.pattern} {form.constants} {free} {[(n, v.shape, v.stride(), v.dtype, v.device) for n, v in values.items()]}"
        if key not in traced:
            try:
                traced[key] = self._trace(form.case, arguments, fake_mode_of(anchor.graph), ())
            except Exception as error:  # noqa: BLE001 - shapes a pattern is not made for may raise anything in it
                return 3.0, f"the pattern does not take these arguments: {error}"
        fitted = traced[key]
        again = match(fitted, anchor, nodes, exact=True)
        if isinstance(again, Miss):
            return 4.0, f"sizes or numbers differ: {again.reason}"
        site = Site(
            nodes,
            {name: arguments[name] for name in form.case.parameters},
            tuple(again.nodes.get(output) for output in fitted.outputs),
            tuple(again.nodes[call] for call in fitted.calls if call in again.nodes),
            form.case.replacement,
        )
        reason = self.guard(site)
        return site if reason is None else (5.0, f"guard: {reason}")

    def _replace(self, site: Site, splicer: Splicer) -> str | None:
        """Put the replacement in; or the reason why it does not fit there."""
        matched = set(site.matched)
        users = [user for output in site.outputs if output for user in output.users if user not in matched]
        if not users:
            return "nobody reads the result"
        first = min(users)
        late = next((name for name, node in site.nodes.items() if not node < first), None)
        if late is not None:
            return f"{late} is computed after the result is read"
        arguments = [site.nodes.get(name, value) for name, value in site.values.items()]
        like = max(site.matched)
        try:
            new = splicer.splice(first, site.replacement, arguments, like)
        except Exception as error:  # noqa: BLE001 - as may those that a replacement is not made for in it
            return f"the replacement does not take these arguments: {error}"
        results = new if isinstance(new, list | tuple) else (new,)
        pairs = [(old, fresh) for old, fresh in zip(site.outputs, results, strict=True) if old is not None]
        for old, fresh in pairs:
            a, b = _layout(old.meta["val"]), _layout(fresh.meta["val"])
            if a != b:
                return f"result is {a}, the replacement gives {b}"
        for old, fresh in pairs:
            old.replace_all_uses_with(fresh)
        return None

    def _form(self, case: Case, sample: tuple[Any, ...]) -> _Form:
        key = (case.pattern, id(sample))
        if key not in self._made:
            with FakeTensorMode() as mode:
                arguments = dict(zip(case.parameters, materialized(sample), strict=True))
            dtypes = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}
            bound = (*dtypes, *self.free)
            constants = {n: v for n, v in arguments.items() if n not in bound and not isinstance(v, float)}
            self._made[key] = _Form(case, self._trace(case, arguments, mode, self.free), dtypes, constants)
        return self._made[key]

    def _trace(self, case: Case, arguments: Mapping[str, Any], mode: Any, free: Sequence[str]) -> Traced:
        """``free``: ints whose place in the pattern is looked for; else they are part of it."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        # a number that occurs nowhere else, and survives rounding, shows where the parameter went
        marks: dict[float, str] = {}
        for i, (name, value) in enumerate(arguments.items()):
            if isinstance(value, float):
                marks[(187 + 2 * i) / 256] = name
            elif name in free:
                marks[100003 + i] = name
        numbers = {name: value for value, name in marks.items()}

        def on_tensors(*given: Tensor) -> Any:
            return case.pattern(**{**arguments, **numbers, **dict(zip(tensors, given, strict=True))})

        graph = trace(on_tensors, list(tensors.values()), mode)
        calls = tuple(node for node in graph.nodes if node.op not in ("placeholder", "output"))
        inputs = dict(zip(tensors, (n for n in graph.nodes if n.op == "placeholder"), strict=True))
        (result,) = next(n for n in graph.nodes if n.op == "output").args
        outputs = tuple(result) if isinstance(result, list | tuple) else (result,)
        for name, node in inputs.items():
            node.target = name
            if not node.users:
                raise ValueError(f"{self.name}: want a pattern that uses its parameters, got one without use of {name}")
        if not all(isinstance(node, fx.Node) and node in calls for node in outputs):
            raise ValueError(f"{self.name}: want a pattern that computes what it returns, got {list(outputs)}")
        return Traced(inputs, marks, outputs, self._anchor(calls), calls, self.shared)  # type: ignore[arg-type]

    def _anchor(self, calls: tuple[fx.Node, ...]) -> fx.Node:
        def fits(node: fx.Node) -> bool:
            if self.anchor is not None:
                return node.target is self.anchor
            name = op_name(node.target).strip("_")
            return node.target not in VIEWS and name not in COMMON and not _gives_number(node)

        dialect = [n for n in calls if getattr(n.target, "namespace", "") == "deepfuse"] if self.anchor is None else []
        found = next((node for node in [*dialect, *calls] if fits(node)), None)
        if found is None:
            raise no_anchor(self.name, self.anchor, [op_name(call.target) for call in calls])
        return found


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


def _place(node: fx.Node) -> str:
    line = source_line(node)
    return f"{where(node)} ({line})" if line else where(node)


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    # the stride of a dimension of size one says nothing
    strides = [str(st) for st, size in zip(value.stride(), value.shape, strict=True) if not _is_one(size)]
    return f"{str(value.dtype).removeprefix('torch.')}{[str(s) for s in value.shape]} with strides {strides}"


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _gives_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def _graph_key(traced: Traced) -> str:
    return "\n".join(f"{n} {n.target} {n.args if n.op != 'placeholder' else ''} {n.kwargs}" for n in traced.calls)
