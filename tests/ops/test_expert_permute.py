"""Sorting by expert: a stable permutation with its inverse, from every provider."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.expert_permute import (
    COMPARE_ROWS,
    _launch,
    compare_few,
    expert_permute,
    expert_permute_ref,
)
from expert_orders import assert_in_order

on_kernel_device = pytest.mark.usefixtures("kernel_device")


def _experts(T, K, E):
    return torch.randint(E, (T, K))


@on_kernel_device
@pytest.mark.parametrize("provider", [expert_permute_ref, compare_few, _launch], ids=["reference", "compare", "triton"])
@settings(max_examples=25)
@given(T=st.integers(0, 9), K=st.integers(1, 4), E=st.integers(1, 9), seed=st.integers(0, 99))
def test_rows_are_a_stable_permutation_by_expert(provider, T, K, E, seed):
    torch.manual_seed(seed)
    x, experts = torch.randn(T, 5), _experts(T, K, E)
    rows, order, inverse, offsets = provider(x, experts, E)
    assert_in_order(experts, E, order, inverse, offsets)
    assert torch.equal(rows, x[order // K])


@on_kernel_device
@pytest.mark.parametrize("D", [1, 20, 1500])
def test_views_and_widths(D):
    x, experts = torch.randn(D, 7, dtype=torch.bfloat16).t(), _experts(7, 4, 5)[:, ::2]
    # columns first; rows of a wider tensor
    for view in (x, torch.cat([x, x], 1)[:, :D]):
        for actual, expected in zip(_launch(view, experts, 5), expert_permute_ref(view, experts, 5), strict=True):
            assert torch.equal(actual, expected)


def test_experts_without_tokens_end_where_the_one_before_ends():
    _, _, _, offsets = expert_permute(torch.ones(3, 2), torch.tensor([[1, 3], [3, 1], [3, 1]]), 5)
    assert offsets.tolist() == [0, 3, 3, 6, 6]


def test_no_tokens():
    rows, order, inverse, offsets = expert_permute(torch.ones(0, 2), torch.ones(0, 3, dtype=torch.int64), 4)
    assert rows.shape == (0, 2) and order.numel() == inverse.numel() == 0 and offsets.tolist() == [0] * 4


def test_gradient():
    x, experts = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), _experts(6, 3, 4)
    x32, drows = x.detach().float().requires_grad_(), torch.randn(18, 5)
    (actual,) = torch.autograd.grad(expert_permute(x32, experts, 4)[0], x32, drows)
    (expected,) = torch.autograd.grad(expert_permute_ref(x, experts, 4)[0], x, drows.double())
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_comparison_is_taken_where_the_rows_are_known_to_be_few():
    few, many = torch.ones(COMPARE_ROWS // 2, 2).long(), torch.ones(COMPARE_ROWS // 2 + 1, 2).long()
    assert expert_permute.choose((torch.ones(len(few), 4), few, 4), compiled=True).provider.name == "compare"
    assert expert_permute.choose((torch.ones(len(many), 4), many, 4), compiled=True).provider.name == "reference"


def test_rejects():
    x, experts = torch.ones(4, 8), torch.ones(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"want x \[T, D\] and experts \[T, K\], got \[4, 8\] and \[8\]"):
        expert_permute(x, experts.flatten(), 4)
    with pytest.raises(ValueError, match="want experts of 4 tokens, got 3"):
        expert_permute(x, experts[:3], 4)
    with pytest.raises(TypeError, match="want int64 experts, got torch.int32"):
        expert_permute(x, experts.int(), 4)
