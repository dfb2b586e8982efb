"""Rows of experts in FP8: bit by bit what the two ops give one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.permute_quantize import permute_quantize
from fp8 import assert_same_bits
from fused_quantize import E4M3, KINDS, every_provider, provider, quantized

pytestmark = pytest.mark.usefixtures("kernel_device")


def _one_after_the_other(name, x, experts, num_experts, dtype, power_of_two):
    rows, *places = provider(expert_permute, name)(x, experts, num_experts)
    return *quantized(name, rows, dtype, power_of_two), *places


@every_provider
@settings(max_examples=20)
@given(
    T=st.integers(0, 9),
    K=st.integers(1, 4),
    D=st.sampled_from([1, 7, 128, 130, 1300]),
    **KINDS,
)
def test_is_a_permutation_and_then_quantize(name, T, K, D, dtype, to, power_of_two, seed):
    torch.manual_seed(seed)
    args = torch.randn(T, D, dtype=dtype), torch.randint(5, (T, K)), 5, to, power_of_two
    assert_same_bits(provider(permute_quantize, name)(*args), _one_after_the_other(name, *args))


@every_provider
def test_views(name):
    x, experts = torch.randn(300, 7, dtype=torch.bfloat16).t(), torch.randint(5, (7, 4))[:, ::2]
    for view in (x, torch.cat([x, x], 1)[:, :300]):
        args = view, experts, 5, E4M3, False
        assert_same_bits(provider(permute_quantize, name)(*args), _one_after_the_other(name, *args))


@every_provider
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(name, odd):
    x, experts = torch.ones(3, 300), torch.tensor([[0, 1], [2, 0], [1, 2]])
    x[1, 5] = odd
    values, _, _, inverse, _ = provider(permute_quantize, name)(x, experts, 3, E4M3, False)
    broken = values.float().isnan()
    assert sorted(broken.any(1).nonzero().flatten().tolist()) == sorted(inverse[2:4].tolist())
    assert broken.sum() == 2 * 128


def test_refuses_what_does_not_fit():
    x, experts = torch.ones(4, 8), torch.ones(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"want x \[T, D\] and experts \[T, K\], got \[4, 8\] and \[8\]"):
        permute_quantize(x, experts.flatten(), 4, E4M3, False)
    with pytest.raises(ValueError, match="want experts of 4 tokens, got 3"):
        permute_quantize(x, experts[:3], 4, E4M3, False)
    with pytest.raises(TypeError, match="want int64 experts, got torch.int32"):
        permute_quantize(x, experts.int(), 4, E4M3, False)
    with pytest.raises(TypeError, match="want x in float16, .* got torch.int64"):
        permute_quantize(x.long(), experts, 4, E4M3, False)
    with pytest.raises(TypeError, match="want dtype float8_e4m3fn or float8_e5m2, got torch.int8"):
        permute_quantize(x, experts, 4, torch.int8, False)
