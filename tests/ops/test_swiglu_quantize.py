"""SwiGLU in FP8: bit by bit what the two ops give one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.swiglu import swiglu
from deepfuse.ops.swiglu_quantize import swiglu_quantize
from fp8 import assert_same_bits
from fused_quantize import E4M3, KINDS, MAGNITUDES, WIDTHS, every_provider, provider, quantized

pytestmark = pytest.mark.usefixtures("kernel_device")


def _one_after_the_other(name, gate, up, dtype, power_of_two):
    y = provider(swiglu, name)(gate, up)
    return y, *quantized(name, y, dtype, power_of_two)


@every_provider
@settings(max_examples=20)
@given(
    M=st.integers(0, 20),
    F=WIDTHS,
    magnitude=MAGNITUDES,
    **KINDS,
)
def test_is_swiglu_and_then_quantize(name, M, F, dtype, to, power_of_two, magnitude, seed):
    torch.manual_seed(seed)
    gate, up = (torch.randn(M, F, dtype=dtype) * magnitude for _ in range(2))
    actual = provider(swiglu_quantize, name)(gate, up, to, power_of_two, True)
    assert_same_bits(actual, _one_after_the_other(name, gate, up, to, power_of_two))


@every_provider
def test_y_is_left_out_on_request(name):
    gate, up = torch.randn(5, 200), torch.randn(5, 200)
    fused = provider(swiglu_quantize, name)
    y, *rest = fused(gate, up, E4M3, False, False)
    assert y.shape == (0,) and y.dtype == torch.float32
    assert_same_bits(rest, fused(gate, up, E4M3, False, True)[1:])


@every_provider
def test_halves_of_one_projection_are_read_where_they_lie(name):
    gate, up = torch.randn(9, 2 * 300, dtype=torch.bfloat16).chunk(2, -1)
    fused = provider(swiglu_quantize, name)
    assert_same_bits(fused(gate, up, E4M3, False, True), fused(gate.clone(), up.clone(), E4M3, False, True))


@every_provider
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(name, odd, power_of_two):
    gate, up = torch.ones(3, 300), torch.ones(3, 300)
    up[1, 5] = odd
    y, values, scale = provider(swiglu_quantize, name)(gate, up, E4M3, power_of_two, True)
    assert_same_bits((y, values, scale), _one_after_the_other(name, gate, up, E4M3, power_of_two))
    assert values.float().isnan().nonzero().tolist() == [[1, f] for f in range(128)]


def test_refuses_what_does_not_fit():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"swiglu_quantize: want gate and up \[M, F\].*got \[2, 4\].*and \[2, 3\]"):
        swiglu_quantize(x, x[:, :3], E4M3, False, True)
    with pytest.raises(ValueError, match=r"torch.float32 and \[2, 4\] torch.bfloat16"):
        swiglu_quantize(x, x.bfloat16(), E4M3, False, True)
    with pytest.raises(ValueError, match=r"got \[4\]"):
        swiglu_quantize(x[0], x[0], E4M3, False, True)
    with pytest.raises(TypeError, match="want dtype float8_e4m3fn or float8_e5m2, got torch.float16"):
        swiglu_quantize(x, x, torch.float16, False, True)
