"""A function of tensors as a graph that passes can match and splice: functional, after Inductor's decompositions.

The functions are short, are called with fake tensors, and there are some hundred of them in a build, so that time is what
matters: this takes a third of what ``make_fx`` does, which serves autograd, subclasses and dynamic control flow too.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from deepfuse.ir.private import inductor_decompositions, named_size, storage_id, value_of_expression

aten = torch.ops.aten
_ITSELF = (aten.alias.default, aten.detach.default)


def trace(fn: Callable[..., Any], like: Sequence[Tensor], fake_mode: Any) -> fx.Graph:
    """The nodes of ``fn`` for tensors of the same shapes, strides, dtypes and devices as these; fakes in ``meta["val"]``.

    Args:
        fn: takes the tensors and returns one or several of what it computed.
        like: may hold one tensor twice; each is an input of its own.
        fake_mode: computes shapes.

    Raises:
        ValueError: it makes a tensor of constants, or writes into a tensor it is given, or into a part of one.
    """
    graph = fx.Graph()
    with fake_mode:
        given = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in like]
        with _Recorder(graph, given) as recorder:
            result = fn(*given)
        graph.output(tree_map(recorder.argument, result))
        for node in graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                # what sizes are computed by
                args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args)  # type: ignore[operator]
    graph.eliminate_dead_code()
    return graph


class _Recorder(TorchDispatchMode):
    """Writes each op that reaches it into a graph."""

    def __init__(self, graph: fx.Graph, given: Sequence[Tensor]):
        super().__init__()
        self.graph, self.given = graph, given
        self.table = inductor_decompositions()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []
        """Ids are unique among objects that live."""
        self.sizes: dict[Any, fx.Node] = {}
        for i, tensor in enumerate(given):
            self._keep(tensor, graph.placeholder(f"given_{i}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        decomposition = self.table.get(func, func.decompose)
        with self:
            result = decomposition(*args, **kwargs)
        if result is not NotImplemented:
            return result
        # before the call: fake tensors would say of a constant something else
        given = self._arguments(args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor | list | tuple):
            return result
        self._keep(result, given[0][0] if func in _ITSELF else self.graph.call_function(func, *given))
        return result

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch writes some of its own functions in place; the graph that is compiled has been made functional."""
        name = func._opname
        memory = storage_id(args[0]) if re.search("[^_]_$", name) else None
        same_memory = [t for t in self.alive if storage_id(t) == memory]
        parts = {self.nodes[id(t)] for t in same_memory}
        if memory is None or len(parts) > 1 or any(storage_id(t) == memory for t in self.given):
            raise ValueError(
                f"trace: want a function that writes into nothing it is given, nor a part, got a call of {func}"
            )
        functional = getattr(getattr(getattr(torch.ops, func.namespace), name.rstrip("_")), func._overloadname)
        with self:
            value = functional(*args, **kwargs)
        node = self.argument(value)
        result = func(*args, **kwargs)
        if value.dtype != result.dtype:  # in place, what was promoted is rounded again
            node = self.graph.call_function(torch.ops.prims.convert_element_type.default, (node, result.dtype))
        self._keep(result, node)
        # decompositions leave the tensor behind under other objects
        self.nodes |= {id(t): node for t in same_memory}
        return result

    def _arguments(self, args: Any, kwargs: Any) -> Any:
        return tree_map(self.argument, (tuple(args), kwargs))

    def argument(self, value: Any) -> Any:
        """The node of a tensor or size; other values as they are."""
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return self._size(value.node.expr)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            raise ValueError(f"trace: want a function without tensor constants, got one of shape {tuple(value.shape)}")
        return self.nodes[id(value)]

    def _keep(self, result: Any, node: fx.Node) -> None:
        node.meta.setdefault("val", result)
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
            self.alive.append(result)
            return
        for i, one in enumerate(result if isinstance(result, list | tuple) else ()):
            # an op may leave a result out, or give a number among them
            self._keep(one, self.graph.call_function(operator.getitem, (node, i)))

    def _size(self, expression: Any) -> Any:
        """A size, from those of the given tensors."""
        if expression.is_Integer:
            return int(expression)
        if expression not in self.sizes:
            self.sizes[expression] = self._dimension(expression) or self._computed(expression)
        return self.sizes[expression]

    def _dimension(self, expression: Any) -> fx.Node | None:
        """A dimension of a given tensor, or a dimension divided by the number that it is a multiple by; or, of a sum, a
        multiple of one: what is left behind a split has a size like T - T // 2, of which 2 T - 2 (T // 2) is twice as much."""
        for tensor, dim, size in self._dimensions():
            times = (size / expression).cancel() if expression.is_Add else size / expression
            multiple = expression.is_Add and (1 / times).is_Integer
            if times.is_Integer or multiple:
                node = self.graph.call_function(aten.sym_size.int, (self.nodes[id(tensor)], dim))
                if times == 1:
                    return node
                if multiple:
                    return self.graph.call_function(operator.mul, (node, int(1 / times)))
                return self.graph.call_function(operator.floordiv, (node, int(times)))
        return None

    def _dimensions(self) -> Iterator[tuple[Tensor, int, Any]]:
        for tensor in self.given:
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt):
                    yield tensor, dim, size.node.expr

    def _computed(self, expression: Any) -> fx.Node:
        if expression.is_Symbol:
            raise ValueError(f"trace: want sizes that follow from those of the tensors, got {expression}")
        known: dict[Any, fx.Proxy] = {}
        for _, _, size in self._dimensions():
            # rows are often a product, of which no factor is a size of any tensor
            if not size.is_Symbol:
                symbol = named_size(f"size_{len(known)}")
                found = _in_terms_of(symbol, size, expression)
                if found is not None:
                    expression, known[symbol] = found, fx.Proxy(self._size(size))
        known |= {symbol: fx.Proxy(self._size(symbol)) for symbol in expression.free_symbols - known.keys()}
        return value_of_expression(expression, known).node


def _in_terms_of(symbol: Any, size: Any, expression: Any) -> Any:
    """``expression`` with ``symbol`` for ``size``, where that stands in it as it is, negated or multiplied out; else ``None``."""
    for standing, named in ((size, symbol), (-size, -symbol)):
        if expression.has(standing):
            expression = expression.subs(standing, named)
    if expression.has(symbol):
        return expression
    for term in size.args if size.is_Add else ():
        # 24 * a + 24 * b, of a size a + b: with a = size - b nothing is left of either
        rest = size - term
        if term.is_Symbol and not rest.has(term):
            found = expression.subs(term, symbol - rest).expand()
            if found.has(symbol) and not found.free_symbols & size.free_symbols:
                return found
    return None
