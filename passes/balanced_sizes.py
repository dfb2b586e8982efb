"""Numbers for a graph's sizes: those that depend on data are taken as they are where the load is balanced.

A graph of experts on several processes has sizes that only routing decides: how many rows go to each process, and come from
each. Costs take them to be equal: each process's part of the rows that are sent.

A graph that serves any number of tokens is told where its sequences begin, or those of each half. They are taken for two of
equal length, so that a graph in halves does the same work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.private import collectives, expression_of, number_of

ALL_TO_ALL = collectives.all_to_all_single.default

SEQUENCES = 2
"""Of a prefill: the fewest that make two halves."""


class BalancedSizes:
    """Numbers for all sizes of one graph.

    Args:
        tokens: of a graph that serves any number; what a size is taken for that neither the graph nor an all-to-all says.
    """

    def __init__(self, graph: fx.Graph, tokens: int):
        starts = _sizes_of_starts(graph)
        self._otherwise = tokens // max(len(starts), 1)
        # one number more than sequences: where the last one ends
        self._known: dict[Any, int] = dict.fromkeys(starts, SEQUENCES // max(len(starts), 1) + 1)
        for node in graph.find_nodes(op="call_function", target=ALL_TO_ALL):
            sent: Any = node.args[0]
            rows = self.size(sent.meta["val"].shape[0])
            for splits in node.args[1:3]:
                self._share(splits, rows)  # type: ignore[arg-type]

    def _share(self, splits: Sequence[Any], rows: int) -> None:
        for split in splits:
            value = split.meta["val"] if isinstance(split, fx.Node) else split
            if isinstance(value, torch.SymInt):
                expression = expression_of(value)
                if expression.is_Symbol:
                    self._known.setdefault(expression, rows // len(splits))

    def size(self, size: Any) -> int:
        """A number for a size, which is a number already or a symbol."""
        return size if isinstance(size, int) else number_of(size, self._known, self._otherwise)

    def tensor(self, value: Tensor) -> Tensor:
        """A tensor of that shape and dtype, without data."""
        return torch.empty([self.size(s) for s in value.shape], dtype=value.dtype, device="meta")

    def bytes(self, value: Tensor) -> int:
        """Bytes of a tensor."""
        total = value.element_size()
        for size in value.shape:
            total *= self.size(size)
        return total

    def arguments(self, node: fx.Node, args: Any) -> Any:
        """Arguments of a call, with tensors without data and numbers for sizes."""
        return torch.utils._pytree.tree_map(self._plain, fx.map_arg(args, lambda n: n.meta["val"]))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        return self.size(value) if isinstance(value, torch.SymInt) else value


def _sizes_of_starts(graph: fx.Graph) -> list[Any]:
    """Symbols of how many numbers say where sequences begin: inputs in int32, whose number is any."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    starts = [v for v in values if isinstance(v, Tensor) and v.dtype == torch.int32 and v.ndim == 1]
    sizes: list[Any] = [v.shape[0] for v in starts]
    symbols = [expression_of(size) for size in sizes if isinstance(size, torch.SymInt)]
    return [symbol for symbol in symbols if symbol.is_Symbol]
