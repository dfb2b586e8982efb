"""Find a traced pattern in a graph, from one node outwards, and say in words how far a match got and why it stopped.

torch's own pattern matcher traces and matches much alike, but keeps its reasons to itself: it drops sites without a
word where a re-trace fails, an operand's dtype is one it knows no fallback for, or a stream or mutation lies between.

A pattern is matched node by node. Operands of commutative ops are tried in both orders; views may have other users
(they compute nothing), other inner nodes may not. Numbers that the pattern takes as parameters are bound; sizes and
dimensions are left open at first (``exact=False``), until the pattern is traced again for the site's own arguments. Of an
op's several results those that the pattern returns may be missing: nobody reads them.
"""

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.alias.default,
        aten.detach.default,
        operator.getitem,
    }
)
"""Calls that compute nothing."""
RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
CAST = torch.ops.prims.convert_element_type.default
"""A conversion of dtype, as the decompositions leave it."""
_COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.eq.Tensor,
    }
)


@dataclass(frozen=True, slots=True)
class Traced:
    """A pattern as a graph.

    Attributes:
        inputs: tensor parameter -> its placeholder.
        marks: the value a number had while tracing -> the parameter it stands for.
        outputs: what the pattern returns.
        anchor: where matching begins.
        calls: all nodes but placeholders and the output, in order.
        shared: ops whose results others than the pattern may read, too.
    """

    inputs: Mapping[str, fx.Node]
    marks: Mapping[float, str]
    outputs: tuple[fx.Node, ...]
    anchor: fx.Node
    calls: tuple[fx.Node, ...]
    shared: frozenset[Any] = frozenset()


@dataclass(slots=True)
class Found:
    """Pattern node -> node of the graph, and what the parameters that are numbers are."""

    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> "Found":
        return Found(dict(self.nodes), dict(self.numbers))


@dataclass(frozen=True, slots=True)
class Miss:
    """How far the best attempt got, in nodes, and why it stopped."""

    reached: int
    wanted: int
    reason: str


Goal = tuple[fx.Node, Any]


def match(traced: Traced, anchor: fx.Node, given: Mapping[str, fx.Node], *, exact: bool) -> Found | Miss:
    """Match a pattern whose anchor is this node.

    Args:
        given: parameters whose nodes are known.
        exact: whether sizes and dimensions must be the pattern's.
    """
    search = _Search(traced, exact)
    goals: list[Goal] = [(traced.anchor, anchor), *((traced.inputs[name], node) for name, node in given.items())]
    found = next(search.solve(Found(), goals), None)
    return search.miss if found is None else found


def op_name(target: Any) -> str:
    """``rms_norm`` for ``deepfuse.rms_norm.default``, ``mul`` for ``aten.mul.Tensor``."""
    return target._opname if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def source_name(node: fx.Node) -> str:
    """The op that gives a node, also as one of several results."""
    many = node.target is operator.getitem and isinstance(node.args[0], fx.Node)
    return op_name(node.args[0].target if many else node.target)  # type: ignore[union-attr]


class _Search:
    def __init__(self, traced: Traced, exact: bool):
        self.traced, self.exact = traced, exact
        self.miss = Miss(0, len(traced.calls), "")

    def solve(self, found: Found, goals: Sequence[Goal]) -> Iterator[Found]:
        """All ways to meet the goals and then to reach the rest of the pattern."""
        if not goals:
            yield from self._outwards(found)
            return
        (wanted, got), rest = goals[0], goals[1:]
        known = found.nodes.get(wanted)
        if known is not None:
            if known is got:
                yield from self.solve(found, rest)
            else:
                self._stop(found, f"two uses of {_param(wanted)} have different values, {known} and {got}")
            return
        if wanted.op == "placeholder":
            if isinstance(got, fx.Node) and isinstance(got.meta.get("val"), Tensor):
                yield from self.solve(_bound(found, wanted, got), rest)
            else:
                self._stop(found, f"{_param(wanted)} is {got}, rule wants a tensor")
            return
        if not isinstance(got, fx.Node) or got.op != "call_function" or not _same_call(wanted, got):
            names = _text(got), op_name(wanted.target)
            if wanted.target is getattr(got, "target", None) is operator.getitem:
                names = _result(got), f"result {wanted.args[1]}"
            elif names[0] == names[1]:  # two overloads of one op
                names = str(got.target), str(wanted.target)
            self._stop(found, f"{names[0]} stands where the rule wants {names[1]}")
            return
        if got in found.nodes.values():
            self._stop(found, f"{_text(got)} stands for two nodes of the rule")
            return
        bound = _bound(found, wanted, got)
        for operands in self._operands(bound, wanted, got):
            attempt = bound.copy()
            more = self._compare(attempt, wanted, got, operands)
            if more is not None:
                yield from self.solve(attempt, [*more, *rest])

    def _operands(self, found: Found, wanted: fx.Node, got: fx.Node) -> list[list[tuple[str, Any, Any]]]:
        """(argument, of the pattern, of the graph) of a call, in each order they may be compared in."""
        ours, theirs = _arguments(wanted), _arguments(got)
        if ours.keys() != theirs.keys():
            self._stop(found, f"{op_name(got.target)} has arguments {[*theirs]}, rule wants {[*ours]}")
            return []
        orders = [[(name, ours[name], theirs[name]) for name in ours]]
        names = list(ours)
        if wanted.target in _COMMUTATIVE and ours.get("alpha", 1) == theirs.get("alpha", 1) == 1:
            a, b = names[:2]
            swapped = {**theirs, a: theirs[b], b: theirs[a]}
            orders.append([(name, ours[name], swapped[name]) for name in ours])
        return orders

    def _compare(
        self, found: Found, wanted: fx.Node, got: fx.Node, operands: list[tuple[str, Any, Any]]
    ) -> list[Goal] | None:
        """Goals for operands that are nodes; ``None`` where another operand differs. Binds numbers."""
        goals: list[Goal] = []
        for name, ours, theirs in operands:
            problem = self._operand(found, goals, ours, theirs)
            if problem:
                self._stop(found, f"{_text(got)}: {name} {problem}")
                return None
        return goals

    def _operand(self, found: Found, goals: list[Goal], ours: Any, theirs: Any) -> str | None:
        if isinstance(ours, fx.Node) and isinstance(ours.meta.get("val"), Tensor):
            goals.append((ours, theirs))
            return None
        if isinstance(ours, fx.Node) and not _is_number(ours.meta.get("val")):
            goals.append((ours, theirs))  # several results, which getitem takes one of
            return None
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
            if any(isinstance(v, fx.Node) and isinstance(v.meta.get("val"), Tensor) for v in ours):
                if len(ours) != len(theirs):
                    return f"has {len(theirs)} parts, rule wants {len(ours)}"
                problems = [self._operand(found, goals, o, t) for o, t in zip(ours, theirs, strict=True)]
                return next(filter(None, problems), None)
            if not self.exact or _plain(ours) == _plain(theirs):
                return None
            return f"is {_plain(theirs)}, rule wants {_plain(ours)}"
        ours, theirs = _plain(ours), _plain(theirs)
        if type(ours) in (int, float) and ours in self.traced.marks:
            name = self.traced.marks[ours]
            if not isinstance(theirs, type(ours) | int) or isinstance(theirs, bool):
                return f"is {_text(theirs)}, rule wants a number"
            if found.numbers.setdefault(name, type(ours)(theirs)) == theirs:
                return None
            return f"is {theirs}, but {name} was {found.numbers[name]} before"
        if _is_size(ours) and _is_size(theirs) and not self.exact:
            return None
        if isinstance(theirs, fx.Node):
            return f"is {_text(theirs)}, rule wants {ours}"
        return None if ours == theirs else f"is {theirs}, rule wants {ours}"

    def _outwards(self, found: Found) -> Iterator[Found]:
        """From the nodes matched so far to their users, until all are matched."""
        for wanted in self.traced.calls:
            if wanted in found.nodes:
                continue
            from_ = next((a for a in wanted.all_input_nodes if a in found.nodes), None)
            if from_ is None:
                continue
            source = found.nodes[from_]
            # what the operand is used by, the nearest first
            users = [u for u in source.users if _same_call(wanted, u) and u not in found.nodes.values()]
            if self._unread(found, wanted):
                continue
            if not users:
                names = ", ".join(sorted(op_name(u.target) if u.op == "call_function" else u.op for u in source.users))
                self._stop(
                    found,
                    f"{_result(source)} is used by {names or 'nobody'}, rule wants it in {op_name(wanted.target)}",
                )
                return
            for user in users:
                yield from self.solve(found, [(wanted, user)])
            return
        if not all(n in found.nodes or self._unread(found, n) for n in self.traced.calls):
            self._stop(found, "the rest of the pattern does not hang together with its anchor")
            return
        problem = self._shared(found)
        if problem:
            self._stop(found, problem)
        else:
            yield found

    def _unread(self, found: Found, wanted: fx.Node) -> bool:
        """Whether this is one of several results of a call, which the pattern returns and the graph has no reader of."""
        if wanted.target is not operator.getitem or wanted not in self.traced.outputs:
            return False
        if any(user.op != "output" for user in wanted.users):
            return False
        (source,) = wanted.all_input_nodes
        return source in found.nodes and not any(_same_call(wanted, user) for user in found.nodes[source].users)

    def _shared(self, found: Found) -> str | None:
        """Why an inner node cannot be dropped: somebody else reads it."""
        matched = set(found.nodes.values())
        for wanted, node in found.nodes.items():
            if wanted.op == "placeholder" or self._stays(found, wanted):
                continue
            if any(user not in matched for user in node.users):
                users = [op_name(u.target) if u.op == "call_function" else u.op for u in node.users]
                who = "result" if node is found.nodes[self.traced.anchor] else _result(node)
                return f"{who} has {len(users)} users: {', '.join(users)}"
        return None

    def _stays(self, found: Found, wanted: fx.Node) -> bool:
        """Whether a node may have other users: it is returned, a number, shared, or a view of what is returned or given."""
        if wanted in self.traced.outputs or _is_number(found.nodes[wanted].meta.get("val")):
            return True
        if wanted.target in self.traced.shared:
            return True
        if found.nodes[wanted].target not in VIEWS:
            return False
        source = next(n for n in wanted.all_input_nodes if isinstance(n.meta.get("val"), Tensor | list | tuple))
        return source.op == "placeholder" or self._stays(found, source)

    def _stop(self, found: Found, reason: str) -> None:
        reached = sum(n in found.nodes for n in self.traced.calls)
        if reached > self.miss.reached or not self.miss.reason:
            self.miss = Miss(reached, len(self.traced.calls), reason)


def _bound(found: Found, wanted: fx.Node, got: fx.Node) -> Found:
    copy = found.copy()
    copy.nodes[wanted] = got
    return copy


def _arguments(node: fx.Node) -> dict[str, Any]:
    """By the schema's names, with its defaults; what says where and how memory is laid out is left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    given: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("device", "layout", "pin_memory", "memory_format"):
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        given[argument.name] = _normal(node, argument.name, value)
    return given


def _normal(node: fx.Node, name: str, value: Any) -> Any:
    """One spelling for each size and dimension: ``-1`` and ends beyond the end have others."""
    result = node.meta.get("val")
    if name == "size" and isinstance(result, Tensor):
        return list(result.shape)
    first = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]
    operand = first.meta.get("val") if isinstance(first, fx.Node) else None
    if not isinstance(operand, Tensor):
        return value
    rank = operand.ndim + (node.target is aten.unsqueeze.default)
    if name in ("dim", "dims") and isinstance(value, list | tuple):
        return [d % rank if isinstance(d, int) and rank else d for d in value]
    if name == "dim" and isinstance(value, int) and rank:
        return value % rank
    if name == "end" and value == sys.maxsize:
        return operand.shape[given % operand.ndim] if isinstance(given := _dim_of_slice(node), int) else value
    return value


def _dim_of_slice(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _same_call(ours: fx.Node, theirs: fx.Node) -> bool:
    """Whether two nodes call the same op; of several results, take the same one."""
    if ours.target is theirs.target is operator.getitem:
        return bool(ours.args[1] == theirs.args[1])
    return ours.target is theirs.target or (ours.target in RESHAPES and theirs.target in RESHAPES)


def _plain(value: Any) -> Any:
    """Sizes as expressions: they are compared without adding a guard, whichever node computes them."""
    if isinstance(value, fx.Node):
        known = value.meta.get("val")
        return _plain(known) if _is_number(known) else value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_size(value: Any) -> bool:
    # a symbolic size is its expression here
    return isinstance(value, int | str) and not isinstance(value, bool)


def _param(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else f"the result of {op_name(node.target)}"


def _text(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return f"the constant {value}" if value is not None else "nothing"
    return op_name(value.target) if value.op == "call_function" else f"the input {value.name}"


def _result(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"result {node.args[1]} of {_text(node.args[0])}"
    return f"result of {_text(node)}"
