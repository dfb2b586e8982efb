"""What is the order of rows by expert."""

from torch import Tensor, int32, int64


def assert_in_order(experts: Tensor, num_experts: int, order: Tensor, inverse: Tensor, offsets: Tensor) -> None:
    """By expert, and within an expert by (token, choice); with the inverse, and the end of each expert's rows."""
    M = experts.numel()
    assert order.dtype == inverse.dtype == int64 and offsets.dtype == int32
    assert sorted(order.tolist()) == list(range(M))
    assert order[inverse].tolist() == list(range(M))
    keys = list(zip(experts.flatten()[order].tolist(), order.tolist(), strict=True))
    assert keys == sorted(keys)
    assert offsets.tolist() == experts.flatten().bincount(minlength=num_experts).cumsum(0).tolist()
