"""How good a kernel must be."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, reference: Tensor, exact: Tensor, times: float = 2.0) -> None:
    """The error is at most so many times the reference's in the same dtype, plus a rounding that fell the other way.

    Args:
        actual: what is tested.
        reference: PyTorch's result, in the dtype of ``actual``.
        exact: the result in float64.
    """
    worst = (reference.double() - exact).abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(actual.double(), exact, atol=times * worst, rtol=torch.finfo(actual.dtype).eps)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether values are the same bit by bit (``torch.equal`` does not take FP8, and NaN never equals NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
