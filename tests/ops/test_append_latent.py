"""Writing into the paged latent cache: only the rows of the slots, wherever they lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.append_latent import (
    PAGE_SIZE,
    _append,
    _launch,
    append_latent,
    append_latent_ref,
    appended_latent,
)

pytestmark = pytest.mark.usefixtures("kernel_device")

every_provider = pytest.mark.parametrize(
    "append", [append_latent_ref, _append, _launch], ids=["reference", "torch", "triton"]
)


def _arguments(slots, C, R, pages=3, dtype=torch.float32):
    slots = torch.tensor(slots, dtype=torch.int64)
    cache = torch.randn(pages, PAGE_SIZE, C + R, dtype=dtype)
    return cache, torch.randn(len(slots), C, dtype=dtype), torch.randn(len(slots), R, dtype=dtype), slots


@every_provider
@settings(max_examples=12)
@given(
    slots=st.lists(st.integers(PAGE_SIZE, 3 * PAGE_SIZE - 1), unique=True, max_size=6),
    C=st.integers(1, 40),
    R=st.integers(1, 20),
)
def test_writes_the_rows_of_the_slots_and_no_others(append, slots, C, R):
    cache, latent, k_rope, slots = _arguments(slots, C, R)
    expected = cache.clone()
    for slot, c, r in zip(slots.tolist(), latent, k_rope, strict=True):
        expected[slot // PAGE_SIZE, slot % PAGE_SIZE] = torch.cat((c, r))
    functional = appended_latent(cache, latent, k_rope, slots)
    append(cache, latent, k_rope, slots)
    assert torch.equal(cache, expected)
    assert torch.equal(functional, expected)


@every_provider
def test_padding_rows_may_collide_in_page_0(append):
    cache, latent, k_rope, slots = _arguments([0, 70, 0, 5, 0, 5], 16, 8)
    before = cache.clone()
    append(cache, latent, k_rope, slots)
    before[1, 6] = torch.cat((latent[1], k_rope[1]))
    assert torch.equal(cache[1:], before[1:])


@every_provider
def test_takes_parts_of_the_rows_of_one_projection(append):
    cache, _, _, slots = _arguments([65, 130, 100], 16, 8)
    latent, k_rope = torch.randn(3, 24).split([16, 8], dim=-1)
    expected = appended_latent(cache, latent, k_rope, slots)
    append(cache, latent, k_rope, slots)
    assert torch.equal(cache, expected)


def test_kernel_takes_columns_that_are_apart():
    cache, latent, k_rope, slots = _arguments([65, 130, 100], 16, 8)
    expected = appended_latent(cache, latent, k_rope, slots)
    _launch(cache, latent.T.contiguous().T, k_rope.T.contiguous().T, slots)
    assert torch.equal(cache, expected)


@every_provider
def test_writes_into_one_layer_of_a_cache_of_many(append):
    _, latent, k_rope, slots = _arguments([65, 130, 100], 16, 8)
    layers = torch.randn(3, 2, PAGE_SIZE, 24)
    expected = layers.clone()
    expected[:, 1] = appended_latent(layers[:, 1], latent, k_rope, slots)
    append(layers[:, 1], latent, k_rope, slots)
    assert torch.equal(layers, expected)


@every_provider
def test_rounds_to_the_dtype_of_the_cache(append):
    _, latent, k_rope, slots = _arguments([65, 130, 100], 16, 8)
    cache = torch.zeros(3, PAGE_SIZE, 24, dtype=torch.bfloat16)
    append(cache, latent, k_rope, slots)
    assert torch.equal(cache.flatten(0, 1)[slots], torch.cat((latent, k_rope), -1).bfloat16())


def test_kernel_wants_contiguous_rows():
    supports = next(p.supports for p in append_latent.providers if p.name == "triton")
    cache, *rest = _arguments([65], 16, 8)
    assert supports(cache, *rest) is None
    assert supports(cache.mT.contiguous().mT, *rest) == "wants a cache with contiguous rows, not strides [1536, 1, 64]"


def test_refuses_what_does_not_fit():
    cache, latent, k_rope, slots = _arguments([65], 16, 8)
    with pytest.raises(ValueError, match=r"append_latent: want cache \[P, 64, C \+ R\].*got \[3, 32, 24\]"):
        append_latent(cache[:, :32], latent, k_rope, slots)
    with pytest.raises(ValueError, match=r"\[1, 16\], \[1, 9\] and \[1\]"):
        append_latent(cache, latent, torch.ones(1, 9), slots)
    with pytest.raises(TypeError, match="append_latent: want int64 slots, got torch.int32"):
        append_latent(cache, latent, k_rope, slots.int())
