"""Expert outputs back to their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.expert_unpermute import _launch, expert_unpermute, expert_unpermute_ref

on_kernel_device = pytest.mark.usefixtures("kernel_device")


def _arguments(T, K, D, dtype=torch.float32):
    order = torch.randperm(T * K)
    weights = torch.rand(T, K)
    return torch.randn(T * K, D, dtype=dtype), order, order.argsort(), weights


@on_kernel_device
@pytest.mark.parametrize("provider", [expert_unpermute_ref, _launch], ids=["reference", "triton"])
@settings(max_examples=25)
@given(T=st.integers(0, 9), K=st.integers(1, 4), E=st.integers(1, 9), seed=st.integers(0, 99))
def test_undoes_expert_permute_where_weights_sum_to_one(provider, T, K, E, seed):
    torch.manual_seed(seed)
    x, experts = torch.randn(T, 5), torch.randint(E, (T, K))
    weights = torch.rand(T, K) + 0.1
    rows, order, inverse, _ = expert_permute(x, experts, E)
    out = provider(rows, order, inverse, weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(out, x)


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "K", "D"), [(1, 1, 1), (5, 3, 20), (4, 8, 1500)])
def test_kernel_error_is_at_most_twice_the_error_of_pytorch(dtype, T, K, D):
    y, order, inverse, weights = _arguments(T, K, D, dtype)
    exact = expert_unpermute_ref(y.double(), order, inverse, weights.double())
    actual, reference = (run(y, order, inverse, weights) for run in (_launch, expert_unpermute_ref))
    assert_as_accurate(actual, reference, exact)


@on_kernel_device
def test_views():
    y, order, inverse, weights = _arguments(4, 2, 6)
    expected = expert_unpermute_ref(y, order, inverse, weights)
    # columns first; rows of a wider tensor
    for view in (y.t().contiguous().t(), torch.cat([y, y], 1)[:, :6]):
        torch.testing.assert_close(_launch(view, order, inverse, weights.t().contiguous().t()), expected)


def test_gradient():
    y, order, inverse, weights = _arguments(6, 3, 5)
    inputs = [t.requires_grad_() for t in (y, weights)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dout = torch.randn(6, 5)
    actual = torch.autograd.grad(expert_unpermute(y, order, inverse, weights), inputs, dout)
    expected = torch.autograd.grad(expert_unpermute_ref(exact[0], order, inverse, exact[1]), exact, dout.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5)


def test_rejects():
    y, order, inverse, weights = _arguments(3, 2, 4)
    with pytest.raises(ValueError, match=r"got \[\[6, 4\], \[6\], \[6\], \[6\]\]"):
        expert_unpermute(y, order, inverse, weights.flatten())
    with pytest.raises(ValueError, match=r"want T \* K = 6 weights, got \[2, 2\]"):
        expert_unpermute(y, order, inverse, weights[:2])
