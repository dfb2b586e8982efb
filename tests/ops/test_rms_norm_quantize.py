"""RMSNorm in FP8: bit by bit what the two ops give one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.rms_norm_quantize import rms_norm_quantize
from fp8 import assert_same_bits
from fused_quantize import E4M3, KINDS, MAGNITUDES, WIDTHS, every_provider, provider, quantized

pytestmark = pytest.mark.usefixtures("kernel_device")
EPS = 1e-6


def _one_after_the_other(name, x, weight, dtype, power_of_two):
    y = provider(rms_norm, name)(x, weight, EPS)
    return y, *quantized(name, y, dtype, power_of_two)


@every_provider
@settings(max_examples=20)
@given(
    M=st.integers(0, 6),
    D=WIDTHS,
    magnitude=MAGNITUDES,
    **KINDS,
)
def test_is_a_norm_and_then_quantize(name, M, D, dtype, to, power_of_two, magnitude, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(M, D, dtype=dtype) * magnitude, torch.randn(D)
    actual = provider(rms_norm_quantize, name)(x, weight, EPS, to, power_of_two, True)
    assert_same_bits(actual, _one_after_the_other(name, x, weight, to, power_of_two))


@every_provider
def test_y_is_left_out_on_request(name):
    x, weight = torch.randn(5, 200), torch.randn(200)
    fused = provider(rms_norm_quantize, name)
    y, *rest = fused(x, weight, EPS, E4M3, False, False)
    assert y.shape == (0,) and y.dtype == torch.float32
    assert_same_bits(rest, fused(x, weight, EPS, E4M3, False, True)[1:])


@every_provider
@pytest.mark.parametrize("columns", [slice(8, 308), slice(0, 600, 2)], ids=["rows apart", "columns apart"])
def test_views(name, columns):
    x, weight = torch.randn(9, 600, dtype=torch.bfloat16)[:, columns], torch.randn(600)[::2]
    fused = provider(rms_norm_quantize, name)
    assert_same_bits(fused(x, weight, EPS, E4M3, True, True), fused(x.clone(), weight.clone(), EPS, E4M3, True, True))


@every_provider
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(name, odd, power_of_two):
    x, weight = torch.ones(3, 300), torch.ones(300)
    x[1, 5] = odd
    actual = provider(rms_norm_quantize, name)(x, weight, EPS, E4M3, power_of_two, True)
    assert_same_bits(actual, _one_after_the_other(name, x, weight, E4M3, power_of_two))
    # the mean square is no number, or x over infinity is zero
    y, values, _ = actual
    broken = y.isnan()
    assert broken[1].any() and not broken[[0, 2]].any()
    blocks = torch.nn.functional.pad(broken, (0, 84)).unflatten(1, (3, 128)).any(-1).repeat_interleave(128, 1)
    assert torch.equal(values.float().isnan(), blocks[:, :300])


def test_refuses_what_does_not_fit():
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(
        ValueError, match=r"rms_norm_quantize: want x \[M, D\] and weight \[D\], got \[2, 4\] and \[3\]"
    ):
        rms_norm_quantize(x, weight[:3], EPS, E4M3, False, True)
    with pytest.raises(ValueError, match=r"got \[2, 1, 4\] and \[4\]"):
        rms_norm_quantize(x[:, None], weight, EPS, E4M3, False, True)
    with pytest.raises(TypeError, match="want x in float16, bfloat16, float32 or float64, got torch.int64"):
        rms_norm_quantize(x.long(), weight, EPS, E4M3, False, True)
    with pytest.raises(TypeError, match="want dtype float8_e4m3fn or float8_e5m2, got torch.float16"):
        rms_norm_quantize(x, weight, EPS, torch.float16, False, True)
