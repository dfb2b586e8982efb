"""The emulated sums of a tensor core: the bits they keep, and what promotion is good for."""

import pytest
import torch

from deepfuse.ir.tensor_core import accumulate_fp8

E4M3 = torch.float8_e4m3fn


def _relative_error(K, promote_every):
    """Of sums of K products, as large as the largest error is against the largest sum."""
    a, b = torch.rand(16, K).to(E4M3), torch.rand(16, K).to(E4M3)
    exact = a.double() @ b.double().t()
    return ((accumulate_fp8(a, b, promote_every).double() - exact).abs().max() / exact.abs().max()).item()


def test_sums_that_fit_are_exact():
    a, b = torch.randint(-3, 4, (5, 64)).to(E4M3), torch.randint(-3, 4, (7, 64)).to(E4M3)
    for promote_every in (None, 32, 128):
        assert torch.equal(accumulate_fp8(a, b, promote_every), a.float() @ b.float().t())


def test_what_lies_13_bits_below_the_largest_is_kept_and_14_is_lost():
    for bits, kept in ((13, 1.0), (14, 0.0)):
        a = torch.zeros(1, 32)
        a[0, 0], a[0, 1] = 128.0, 128.0 * 2.0**-bits
        assert accumulate_fp8(a.to(E4M3), torch.ones(1, 32), None).item() == 128.0 + kept * a[0, 1].item()
    # cut off, not rounded: toward zero on either side
    a[0, 1] = -128.0 * 1.5 * 2.0**-13
    assert accumulate_fp8(a, torch.ones(1, 32), None).item() == 128.0 - 128.0 * 2.0**-13


def test_promoted_sums_keep_what_long_sums_lose():
    # beside 2**8 the last bit kept is 2**-5, and every term falls off
    a, b = torch.full((1, 65536), 2.0**-7), torch.ones(1, 65536)
    a[0, 0] = 256.0
    exact = 256.0 + 65535 * 2.0**-7
    assert accumulate_fp8(a, b, None).item() == 256.0
    assert abs(accumulate_fp8(a, b, 128).item() - exact) < 3


def test_the_error_grows_with_k_unless_promoted():
    without = [_relative_error(K, None) for K in (512, 2048, 8192)]
    promoted = [_relative_error(K, 128) for K in (512, 2048, 8192)]
    assert without[0] * 2 < without[1] and without[1] * 2 < without[2]
    assert promoted[2] < promoted[0] * 1.5
    # at the K of DeepSeek-V3's example
    assert _relative_error(4096, None) > 30 * _relative_error(4096, 128)


def test_refuses():
    a = torch.ones(2, 64)
    with pytest.raises(ValueError, match=r"got \[2, 64\] and \[2, 32\]"):
        accumulate_fp8(a, a[:, :32], None)
    with pytest.raises(ValueError, match="want promote_every a multiple of 32, got 100"):
        accumulate_fp8(a, a, 100)
