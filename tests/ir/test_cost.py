import dataclasses

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from deepfuse.ir.cost import Cost, tensor_bytes


def test_costs_add_up():
    assert Cost(flops=1, bytes=10) + Cost(flops=2, bytes=20) == Cost(flops=3, bytes=30)


def test_a_cost_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cost(flops=1, bytes=1).flops = 2


@pytest.mark.parametrize(
    ("dtype", "item"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.float8_e4m3fn, 1), (torch.bool, 1)]
)
def test_bytes_are_those_of_the_elements(dtype, item):
    assert tensor_bytes(torch.empty(3, 5, dtype=dtype)) == 15 * item


def test_bytes_of_several_tensors_of_none_and_of_nothing():
    assert tensor_bytes(torch.ones(2), None, torch.ones(3, dtype=torch.int64)) == 8 + 24
    assert tensor_bytes() == tensor_bytes(None) == tensor_bytes(torch.ones(0, 4)) == 0


def test_a_view_counts_what_it_shows():
    assert tensor_bytes(torch.ones(10)[::2]) == 20
    assert tensor_bytes(torch.ones(1).expand(6)) == 24


def test_sizes_may_be_symbols():
    T = ShapeEnv().create_unbacked_symint()
    with torch._subclasses.FakeTensorMode(shape_env=T.node.shape_env):
        cost = Cost(flops=2 * T, bytes=tensor_bytes(torch.empty(T, 4)))
    assert isinstance(cost.bytes, torch.SymInt)
    assert str((cost + cost).bytes) == f"32*{T}"
