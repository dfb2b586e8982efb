"""Sizes, which are an ``int`` or, while a graph is traced for any size, a symbol."""

from typing import Any


def differ(a: Any, b: Any) -> bool:
    """Whether both sizes are known and are not the same; asks nothing of symbols, which would tie the graph to an answer."""
    return isinstance(a, int) and isinstance(b, int) and a != b
