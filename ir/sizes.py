"""Sizes that must agree, known or not.

A size is an ``int``, or a symbol while a graph is traced for any size. A symbol must not be compared by ``if``: that
would fix the graph to the sizes at hand, or fail where there are none.
"""

from collections.abc import Callable
from typing import Any

import torch


def differ(a: Any, b: Any) -> bool:
    """Whether both sizes are known and are not the same."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def check_equal(actual: Any, wanted: Any, message: Callable[[], str]) -> None:
    """Refuse sizes that differ; of symbols, the graph notes that they are equal and checks it when it runs.

    Raises:
        ValueError: both are known, and differ.
        RuntimeError: a symbol stands for another size.
    """
    if differ(actual, wanted):
        raise ValueError(message())
    if not (isinstance(actual, int) and isinstance(wanted, int)):
        torch._check(actual == wanted, message)
