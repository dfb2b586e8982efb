"""Reading pages out of the latent cache in FP8: what was appended, dequantized, in the order of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import append_latent_fp8, row_bytes
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.gather_latent_fp8 import _launch, gather_latent_fp8, gather_latent_fp8_ref
from deepfuse.ops.quantize import quantize

pytestmark = pytest.mark.usefixtures("kernel_device")

every_provider = pytest.mark.parametrize("gather", [gather_latent_fp8_ref, _launch], ids=["reference", "triton"])


def _written(table, length, C, R, dtype=torch.float32):
    """A cache with the tokens of the table's first row, all bits set where there are none; latents and keys."""
    cache = torch.full((8, PAGE_SIZE, row_bytes(C, R)), 255, dtype=torch.uint8)
    latent, k_rope = torch.randn(length, C, dtype=dtype), torch.randn(length, R, dtype=dtype)
    place = torch.arange(length)
    append_latent_fp8(cache, latent, k_rope, table[0, place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE)
    return cache, latent, k_rope


@every_provider
@settings(max_examples=12)
@given(
    length=st.integers(0, 2 * PAGE_SIZE),
    C=st.sampled_from([4, 100, 128, 132, 512]),
    R=st.sampled_from([2, 6, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_what_was_appended_is_gathered_rounded(gather, length, C, R, dtype, seed):
    torch.manual_seed(seed)
    table = torch.randperm(8)[:4].reshape(2, 2)
    cache, latent, k_rope = _written(table, length, C, R, dtype)
    rows, starts = gather(cache, table, C, dtype)
    assert rows.shape == (4 * PAGE_SIZE, C + R) and rows.dtype == dtype
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 2 * PAGE_SIZE]
    values, scale = quantize(latent, torch.float8_e4m3fn, 1, 128, False)
    assert torch.equal(rows[:length, :C], dequantize(values, scale, 1, 128, dtype))
    assert torch.equal(rows[:length, C:], k_rope.bfloat16().to(dtype))


@every_provider
@pytest.mark.parametrize("shape", [(0, 2), (2, 0)], ids=str)
def test_no_pages_give_no_rows(gather, shape):
    cache = torch.zeros(2, PAGE_SIZE, row_bytes(16, 8), dtype=torch.uint8)
    rows, starts = gather(cache, torch.zeros(shape, dtype=torch.int64), 16, torch.float32)
    assert rows.shape == (0, 24) and starts.tolist() == [0] * shape[0]


@every_provider
def test_reads_one_layer_of_a_cache_of_many(gather):
    table = torch.tensor([[1, 3], [0, 2]])
    cache, _, _ = _written(table, 100, 16, 8)
    layers = torch.stack([cache, cache.flip(0)], 1)
    expected, _ = gather_latent_fp8_ref(cache, table, 16, torch.float32)
    rows, _ = gather(layers[:, 0], table.T.contiguous().T, 16, torch.float32)
    torch.testing.assert_close(rows, expected, atol=0, rtol=0, equal_nan=True)


def test_kernel_wants_rows_where_their_numbers_are_aligned():
    supports = next(p.supports for p in gather_latent_fp8.providers if p.name == "triton")
    cache, table = torch.zeros(2, PAGE_SIZE, row_bytes(16, 8), dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
    assert supports(cache, table, 16, torch.float32) is None
    assert supports(cache, table, 16, torch.float64) == "computes in float32"
    strided = cache.mT.contiguous().mT
    assert supports(strided, table, 16, torch.float32).startswith("wants a cache with contiguous rows")


def test_refuses_what_does_not_fit():
    cache, table = torch.zeros(2, PAGE_SIZE, row_bytes(16, 8), dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"gather_latent_fp8: want cache \[pages, 64, W\] .*got \[2, 32, 36\] and \[1"):
        gather_latent_fp8(cache[:, :32], table, 16, torch.float32)
    with pytest.raises(ValueError, match=r"gather_latent_fp8: want rows of .*, got 36 bytes for C = 40 and R = 0"):
        gather_latent_fp8(cache, table, 40, torch.float32)
    with pytest.raises(ValueError, match="C a multiple of 4 .* got 36 bytes for C = 18 and R = 7"):
        gather_latent_fp8(cache, table, 18, torch.float32)
    with pytest.raises(TypeError, match="gather_latent_fp8: want a cache of bytes, uint8, got torch.int8"):
        gather_latent_fp8(cache.view(torch.int8), table, 16, torch.float32)
    with pytest.raises(TypeError, match="want dtype float16, bfloat16, float32 or float64, got torch.float8_e4m3fn"):
        gather_latent_fp8(cache, table, 16, torch.float8_e4m3fn)
