"""The order of rows by expert: counted by the kernel that moves them, or found by a sort before it."""

import pytest
import torch

from deepfuse.ops import expert_order as module
from deepfuse.ops.expert_order import (
    COUNTED_KEYS,
    COUNTED_PLACES,
    COUNTED_ROWS,
    _compare_sort,
    _counting_sort,
    find_order,
)
from deepfuse.ops.expert_permute import _launch, expert_permute_ref
from deepfuse.ops.permute_quantize import _launch as _launch_quantized
from deepfuse.ops.permute_quantize import permute_quantize_ref
from expert_orders import assert_in_order
from fp8 import assert_same_bits

E4M3 = torch.float8_e4m3fn
on_kernel_device = pytest.mark.usefixtures("kernel_device")


def _experts(T, K, E, spread):
    return torch.randint(spread, (T, K)) + (E - spread)


def _is_counted(T, K, pieces):
    return find_order(torch.zeros(T, K, dtype=torch.int64), 4, pieces)[2]["COUNT"]


@on_kernel_device
@pytest.mark.parametrize("sort", [_compare_sort, _counting_sort])
# within a block; over blocks, the last of them not full; all rows to one expert
@pytest.mark.parametrize(("T", "K", "E", "spread"), [(3, 2, 5, 5), (64, 2, 3, 3), (75, 4, 20, 20), (150, 2, 7, 1)])
def test_both_sorts(sort, T, K, E, spread):
    experts = _experts(T, K, E, spread)
    assert_in_order(experts, E, *sort(experts, E))


@on_kernel_device
# one row; the last tile of keys full, and not; K = 9 and an expert more, as with a shared expert beside the routed; as many
# choices as a program counts; all rows to one expert; several programs a token find the offsets, and more than one each
@pytest.mark.parametrize(
    ("T", "K", "E", "spread", "D"),
    [(1, 1, 1, 1, 3), (64, 1, 5, 5, 3), (13, 5, 7, 7, 20), (4, 9, 257, 257, 3), (3, 16, 16, 16, 3), (40, 3, 7, 1, 3), (2, 8, 100, 100, 2100)],
)  # fmt: skip
def test_counted_is_as_sorted(T, K, E, spread, D, monkeypatch):
    x, experts = torch.randn(T, D), _experts(T, K, E, spread)
    for name in ("_compare_sort", "_counting_sort"):
        monkeypatch.setattr(module, name, None)
    counted, quantized = _launch(x, experts, E), _launch_quantized(x, experts, E, E4M3, False)
    monkeypatch.undo()
    assert_in_order(experts, E, *counted[1:])
    assert_same_bits(counted, expert_permute_ref(x, experts, E))
    assert_same_bits(quantized, permute_quantize_ref(x, experts, E, E4M3, False))
    monkeypatch.setattr(module, "COUNTED_ROWS", 0)
    assert_same_bits(counted, _launch(x, experts, E))
    assert_same_bits(quantized, _launch_quantized(x, experts, E, E4M3, False))


@on_kernel_device
def test_more_rows_than_are_compared(monkeypatch):
    for limit in ("COUNTED_ROWS", "COMPARED_ROWS"):
        monkeypatch.setattr(module, limit, 150)
    monkeypatch.setattr(module, "_compare_sort", None)
    x, experts = torch.randn(40, 3), _experts(40, 4, 40, 40)
    assert_same_bits(_launch(x, experts, 40), expert_permute_ref(x, experts, 40))


@on_kernel_device
def test_experts_that_are_none_are_ordered_as_the_others():
    experts = torch.tensor([[-1, 5], [3, -2], [0, 7]])
    x = torch.randn(3, 4)
    assert_same_bits(_launch(x, experts, 4), expert_permute_ref(x, experts, 4))


@on_kernel_device
def test_few_rows_are_counted():
    assert _is_counted(COUNTED_ROWS // 8, 8, 7) and not _is_counted(COUNTED_ROWS // 8 + 1, 8, 7)
    # many tokens of few rows read as many keys
    assert COUNTED_ROWS * COUNTED_ROWS == COUNTED_KEYS
    assert _is_counted(COUNTED_ROWS, 1, 1) and not _is_counted(COUNTED_ROWS, 1, 2)
    assert _is_counted(2, COUNTED_PLACES, 1) and not _is_counted(2, COUNTED_PLACES + 1, 1)
    # nothing to move, nobody to count
    assert not _is_counted(0, 8, 7) and not _is_counted(3, 8, 0)
