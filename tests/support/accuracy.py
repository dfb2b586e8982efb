"""How good a kernel must be."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The error is at most twice the reference's in the same dtype, plus a rounding that fell the other way.

    Args:
        actual: what is tested.
        reference: PyTorch's result, in the dtype of ``actual``.
        exact: the result in float64.
    """
    worst = (reference.double() - exact).abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(actual.double(), exact, atol=2 * worst, rtol=torch.finfo(actual.dtype).eps)
