"""One step of absorbed attention over a cache in FP8: mla_decode over the dequantized rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from decode_arguments import decode_arguments_fp8
from deepfuse.ops import mla_decode_splits as module
from deepfuse.ops.append_latent_fp8 import unpacked_rows
from deepfuse.ops.mla_decode import mla_decode_ref
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8, mla_decode_fp8_ref
from deepfuse.ops.mla_decode_splits import mixed_attention
from uninitialized import uninitialized_memory_is_nan

pytestmark = pytest.mark.usefixtures("kernel_device")

every_provider = pytest.mark.parametrize("decode", [mla_decode_fp8_ref, mixed_attention], ids=["reference", "triton"])


def _dequantized_decode(q_latent, q_rope, cache, *rest):
    """In float64, the rows rounded as the op says."""
    rows = torch.cat(unpacked_rows(cache, q_latent.shape[2], q_latent.dtype), -1)
    return mla_decode_ref(q_latent.double(), q_rope.double(), rows.double(), *rest)


@every_provider
@settings(max_examples=12)
@given(
    seqlens=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    H=st.integers(1, 20),
    C=st.sampled_from([4, 16, 100, 132, 256]),
    R=st.sampled_from([2, 8, 20]),
    seed=st.integers(0, 99),
)
def test_is_mla_decode_over_the_dequantized_rows(decode, seqlens, H, C, R, seed):
    torch.manual_seed(seed)
    args = decode_arguments_fp8(seqlens, 4, H, C, R)
    torch.testing.assert_close(decode(*args).double(), _dequantized_decode(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# all heads in one block; two blocks, the last with one head, and the widths of DeepSeek-V3
@pytest.mark.parametrize(("H", "C", "R"), [(5, 100, 20), (65, 512, 64)])
def test_kernel_error_is_at_most_twice_that_of_the_reference(H, C, R, dtype):
    args = decode_arguments_fp8([70, 3], 2, H, C, R, dtype)
    assert_as_accurate(mixed_attention(*args), mla_decode_fp8_ref(*args), _dequantized_decode(*args))


@pytest.mark.parametrize("num_splits", [1, 2, 5, 7])
def test_any_number_of_splits_gives_the_same(monkeypatch, num_splits):
    # more splits than pages, so that some are empty
    args = decode_arguments_fp8([300, 64, 1, 0], 5, 3, 16, 8)
    monkeypatch.setattr(module, "num_splits_for", lambda num_programs, P: num_splits)
    with uninitialized_memory_is_nan():
        out = mixed_attention(*args)
    torch.testing.assert_close(out, mla_decode_fp8_ref(*args))


@every_provider
def test_a_padding_row_gives_zeros(decode):
    args = decode_arguments_fp8([0, 0], 2, 3, 16, 8)
    assert torch.equal(decode(*args), torch.zeros(2, 3, 16))


@every_provider
def test_nothing_in_gives_nothing_out(decode):
    q_latent, q_rope, cache, table, seqlens, scale = decode_arguments_fp8([3], 1, 2, 16, 8)
    assert decode(q_latent[:0], q_rope[:0], cache, table[:0], seqlens[:0], scale).shape == (0, 2, 16)


def test_kernel_takes_one_layer_of_a_cache_of_many():
    args = decode_arguments_fp8([70, 10], 2, 3, 16, 8)
    layers = torch.full((args[2].shape[0], 3, *args[2].shape[1:]), 255, dtype=torch.uint8)
    layers[:, 1] = args[2]
    assert torch.equal(mixed_attention(*args[:2], layers[:, 1], *args[3:]), mixed_attention(*args))


def test_kernel_refuses_what_it_cannot_hold():
    supports = next(p.supports for p in mla_decode_fp8.providers if p.name == "triton")
    args = decode_arguments_fp8([3], 1, 2, 16, 8)
    assert supports(*args) is None
    assert supports(args[0].double(), args[1].double(), *args[2:]) == "computes in float32 at most"
    assert supports(*decode_arguments_fp8([3], 1, 1, 516, 8)) == "a latent of at most 512 and 64 fits, not 516 and 8"
    assert supports(*args[:2], args[2].mT.contiguous().mT, *args[3:]).startswith("wants a cache with contiguous rows")


def test_refuses_what_does_not_fit():
    q_latent, q_rope, cache, table, seqlens, scale = decode_arguments_fp8([3, 4], 1, 2, 16, 8)
    with pytest.raises(ValueError, match=r"mla_decode_fp8: want .* cache \[pages, 64, W\].*got .*\[3, 32, 36\]"):
        mla_decode_fp8(q_latent, q_rope, cache[:, :32], table, seqlens, scale)
    with pytest.raises(ValueError, match=r"seqlens \[B\], got .*\[1\]\]"):
        mla_decode_fp8(q_latent, q_rope, cache, table, seqlens[:1], scale)
    with pytest.raises(ValueError, match="got 36 bytes for C = 16 and R = 6"):
        mla_decode_fp8(q_latent, q_rope[..., :6], cache, table, seqlens, scale)
    with pytest.raises(TypeError, match="of one dtype, got torch.float32 and torch.bfloat16"):
        mla_decode_fp8(q_latent, q_rope.bfloat16(), cache, table, seqlens, scale)
    with pytest.raises(TypeError, match="want a cache of bytes, uint8, got torch.int8"):
        mla_decode_fp8(q_latent, q_rope, cache.view(torch.int8), table, seqlens, scale)
