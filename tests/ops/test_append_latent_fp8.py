"""Writing into the latent cache in FP8: the bytes of FlashMLA's rows, and no others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import (
    _append,
    _launch,
    append_latent_fp8,
    append_latent_fp8_ref,
    appended_latent_fp8,
    row_bytes,
    unpacked_rows,
)
from deepfuse.ops.quantize import quantize

pytestmark = pytest.mark.usefixtures("kernel_device")

every_provider = pytest.mark.parametrize(
    "append", [append_latent_fp8_ref, _append, _launch], ids=["reference", "torch", "triton"]
)


def _arguments(slots, C, R, dtype=torch.float32):
    slots = torch.tensor(slots, dtype=torch.int64)
    cache = torch.randint(256, (3, PAGE_SIZE, row_bytes(C, R)), dtype=torch.uint8)
    return cache, torch.randn(len(slots), C, dtype=dtype), torch.randn(len(slots), R, dtype=dtype), slots


def test_a_token_of_deepseek_v3_takes_656_bytes():
    assert row_bytes(512, 64) == 656


@every_provider
@settings(max_examples=12)
@given(
    slots=st.lists(st.integers(PAGE_SIZE, 3 * PAGE_SIZE - 1), unique=True, max_size=6),
    C=st.sampled_from([4, 64, 128, 132, 512]),
    R=st.sampled_from([2, 6, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_writes_values_then_scales_then_rotated_keys_and_nothing_else(append, slots, C, R, dtype, seed):
    torch.manual_seed(seed)
    cache, latent, k_rope, slots = _arguments(slots, C, R, dtype)
    values, scales = quantize(latent, torch.float8_e4m3fn, 1, 128, False)
    expected = cache.clone()
    for i, slot in enumerate(slots.tolist()):
        row = expected[slot // PAGE_SIZE, slot % PAGE_SIZE]
        row[:C] = values[i].view(torch.uint8)
        row[C : -2 * R] = torch.tensor(scales[i].tolist()).view(torch.uint8)
        row[-2 * R :] = k_rope[i].bfloat16().view(torch.uint8)
    functional = appended_latent_fp8(cache, latent, k_rope, slots)
    append(cache, latent, k_rope, slots)
    assert torch.equal(cache, expected)
    assert torch.equal(functional, expected)


@every_provider
def test_what_is_read_back_is_near_what_was_written(append):
    cache, latent, k_rope, slots = _arguments([65, 130, 100], 160, 8)
    append(cache, latent, k_rope, slots)
    back, rope = unpacked_rows(cache.flatten(0, 1)[slots], 160, torch.float32)
    # half a unit of the last place of E4M3; what is small beside the largest of its block, half the least number
    floor = torch.stack([part.abs().amax(1) for part in latent.split(128, 1)], 1) / 448 * 2**-10
    bound = latent.abs() * 2**-4 + floor.repeat_interleave(128, 1)[:, :160]
    assert ((back - latent).abs() <= bound * 1.0001).all()
    assert torch.equal(rope, k_rope.bfloat16().float())


@every_provider
def test_padding_rows_may_collide_in_page_0(append):
    cache, latent, k_rope, slots = _arguments([0, 70, 0, 5, 0, 5], 16, 8)
    expected = appended_latent_fp8(cache, latent[1:2], k_rope[1:2], slots[1:2])
    append(cache, latent, k_rope, slots)
    assert torch.equal(cache[1:], expected[1:])


@every_provider
def test_takes_parts_of_one_projection_and_one_layer_of_a_cache_of_many(append):
    cache, _, _, slots = _arguments([65, 130, 100], 16, 8)
    latent, k_rope = torch.randn(3, 24).split([16, 8], dim=-1)
    layers = torch.stack([cache, cache], 1)
    expected = layers.clone()
    expected[:, 1] = appended_latent_fp8(cache, latent, k_rope, slots)
    append(layers[:, 1], latent, k_rope, slots)
    assert torch.equal(layers, expected)


def test_kernel_takes_columns_that_are_apart():
    cache, latent, k_rope, slots = _arguments([65, 130, 100], 16, 8)
    expected = appended_latent_fp8(cache, latent, k_rope, slots)
    _launch(cache, latent.T.contiguous().T, k_rope.T.contiguous().T, slots)
    assert torch.equal(cache, expected)


def test_kernel_wants_rows_where_their_numbers_are_aligned():
    supports = next(p.supports for p in append_latent_fp8.providers if p.name == "triton")
    cache, latent, *rest = _arguments([65], 16, 8)
    assert supports(cache, latent, *rest) is None
    assert supports(cache.mT.contiguous().mT, latent, *rest).startswith("wants a cache with contiguous rows")
    apart = torch.zeros(3, PAGE_SIZE, cache.shape[2] + 1, dtype=torch.uint8)[..., :-1]
    assert supports(apart, latent, *rest) == "wants pages and rows at multiples of 4 bytes, not [2368, 37]"
    assert supports(cache, latent.double(), *rest) == "computes in float32"


def test_refuses_what_does_not_fit():
    cache, latent, k_rope, slots = _arguments([65], 16, 8)
    with pytest.raises(ValueError, match=r"append_latent_fp8: want cache \[P, 64, W\].*got \[3, 32, 36\]"):
        append_latent_fp8(cache[:, :32], latent, k_rope, slots)
    with pytest.raises(ValueError, match="got 36 bytes for C = 16 and R = 10"):
        append_latent_fp8(cache, latent, torch.ones(1, 10), slots)
    with pytest.raises(ValueError, match="C a multiple of 4 and R of 2, got 36 bytes for C = 18 and R = 7"):
        append_latent_fp8(cache, torch.ones(1, 18), torch.ones(1, 7), slots)
    with pytest.raises(TypeError, match="want a cache of bytes, uint8, got torch.int8"):
        append_latent_fp8(cache.view(torch.int8), latent, k_rope, slots)
    with pytest.raises(TypeError, match="append_latent_fp8: want int64 slots, got torch.int32"):
        append_latent_fp8(cache, latent, k_rope, slots.int())
