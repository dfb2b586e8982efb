"""What an op costs: floating-point operations and bytes that must cross memory.

The figures are ideals: each input read once, each output written once, nothing cached between ops. From them come
the roofline of the profiler, the choice between expanded and absorbed attention, and the decision to overlap.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one call.

    Attributes:
        flops: floating-point operations; a multiply-add counts as two.
        bytes: bytes read plus bytes written.
    """

    flops: Any
    bytes: Any

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def tensor_bytes(*tensors: Tensor | None) -> Any:
    """Bytes the tensors hold (an int, or symbolic for symbolic shapes); ``None`` counts nothing."""
    return sum(t.numel() * t.element_size() for t in _present(tensors))


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]
