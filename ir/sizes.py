"""Sizes, which are an ``int`` or, while a graph is traced for any size, a symbol."""

from collections.abc import Callable
from typing import Any

import torch


def differ(a: Any, b: Any) -> bool:
    """Whether both sizes are known and are not the same; asks nothing of symbols, which would tie the graph to an answer."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def check_value(condition: Any, message: Callable[[], str]) -> None:
    """Raise ``ValueError`` where a condition is false; one on symbols is asked when they are known.

    ``torch._check_value``, but for conditions that are known: its first call imports sympy, for half a second.
    """
    if not isinstance(condition, bool):
        torch._check_value(condition, message)
    elif not condition:
        raise ValueError(message())


def known_size(compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives; ``None`` where it asks something of a size that only the data decide."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        return compute()
    except GuardOnDataDependentSymNode:
        return None
