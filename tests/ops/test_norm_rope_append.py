"""Norm, rotation and cache write at once: bit by bit what the ops do one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops import append_latent as plain
from deepfuse.ops import append_latent_fp8 as fp8
from deepfuse.ops import rms_norm, rotary
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import row_bytes
from deepfuse.ops.norm_rope_append import (
    _launch,
    _write,
    norm_rope_append,
    norm_rope_append_ref,
    norm_rope_appended,
)

pytestmark = pytest.mark.usefixtures("kernel_device")

PROVIDERS = {"reference": norm_rope_append_ref, "torch": _write, "triton": _launch}
every_provider = pytest.mark.parametrize("name", PROVIDERS)
every_format = pytest.mark.parametrize("in_fp8", [False, True], ids=["numbers", "fp8"])


def _arguments(slots, C, R, in_fp8, dtype=torch.float32, interleaved=True, keep=True):
    width, stored = (row_bytes(C, R), torch.uint8) if in_fp8 else (C + R, dtype)
    angle = torch.rand(len(slots), R // 2) * 6
    return [
        torch.ones(3, PAGE_SIZE, width, dtype=stored),
        torch.randn(len(slots), C, dtype=dtype),
        torch.randn(len(slots), R, dtype=dtype),
        torch.randn(C, dtype=dtype),
        angle.cos(),
        angle.sin(),
        torch.tensor(slots, dtype=torch.int64),
        1e-6,
        interleaved,
        keep,
    ]


def _one_by_one(name, cache, latent, k_rope, weight, cos, sin, slots, eps, interleaved, keep):
    """By the kernels of the three ops for the kernel, by their references for the others; the cache after it as well."""
    is_kernel = name == "triton"
    norm = rms_norm._launch if is_kernel else rms_norm.rms_norm_ref
    turn = rotary._launch if is_kernel else rotary.rotary_ref
    module = fp8 if cache.dtype == torch.uint8 else plain
    latent = norm(latent, weight, eps)
    k_rope = turn(k_rope[:, None], cos, sin, interleaved)[:, 0]
    written = cache.clone()
    (module._launch if is_kernel else module._append)(written, latent, k_rope, slots)
    return (latent, k_rope) if keep else (latent[:0, 0], k_rope[:0, 0]), written


def _assert_as_one_by_one(name, args):
    expected, written = _one_by_one(name, *args)
    for got, want in zip(PROVIDERS[name](*args), expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert torch.equal(args[0], written)


@every_provider
@settings(max_examples=12)
@given(
    slots=st.lists(st.integers(PAGE_SIZE, 3 * PAGE_SIZE - 1), unique=True, max_size=4),
    C=st.sampled_from([4, 64, 132, 512]),
    R=st.sampled_from([2, 6, 64]),
    in_fp8=st.booleans(),
    interleaved=st.booleans(),
    keep=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_is_the_three_ops_bit_by_bit(name, slots, C, R, in_fp8, interleaved, keep, dtype, seed):
    torch.manual_seed(seed)
    _assert_as_one_by_one(name, _arguments(slots, C, R, in_fp8, dtype, interleaved, keep))


@every_format
def test_the_functional_form_leaves_its_cache_alone(in_fp8):
    args = _arguments([70, 130], 16, 8, in_fp8)
    before = args[0].clone()
    *kept, written = norm_rope_appended(*args)
    assert torch.equal(args[0], before) and not torch.equal(written, before)
    for got, want in zip(norm_rope_append(*args), kept, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(args[0], written)


@every_provider
@every_format
def test_padding_rows_may_collide_in_page_0(name, in_fp8):
    args = _arguments([0, 70, 0, 5, 0, 5], 16, 8, in_fp8)
    _, expected = _one_by_one(
        name, args[0], *(a[1:2] for a in args[1:3]), args[3], *(a[1:2] for a in args[4:7]), *args[7:]
    )
    PROVIDERS[name](*args)
    assert torch.equal(args[0][1:], expected[1:])


@every_provider
@every_format
def test_takes_parts_of_one_projection_and_of_wider_tables_and_one_layer_of_many(name, in_fp8):
    args = _arguments([65, 130, 100], 16, 8, in_fp8)
    args[1], args[2] = torch.randn(3, 24).split([16, 8], dim=-1)
    args[4], args[5] = torch.rand(3, 12).split([4, 8], dim=-1)[0], torch.rand(3, 12)[:, 8:]
    layers = torch.stack([args[0], args[0]], 1)
    args[0] = layers[:, 1]
    _assert_as_one_by_one(name, args)
    assert (layers[:, 0] == 1).all()


@every_format
def test_kernel_takes_columns_that_are_apart(in_fp8):
    args = _arguments([65, 130, 100], 16, 8, in_fp8)
    for i in (1, 2, 4, 5):
        args[i] = args[i].T.contiguous().T
    _assert_as_one_by_one("triton", args)


@every_provider
@every_format
def test_rounds_what_it_keeps_to_its_dtype_and_what_it_writes_to_that_of_the_cache(name, in_fp8):
    args = _arguments([65, 130, 100], 16, 8, in_fp8)
    if not in_fp8:
        args[0] = args[0].bfloat16()
    _assert_as_one_by_one(name, args)


def test_kernel_wants_rows_it_can_write():
    supports = next(p.supports for p in norm_rope_append.providers if p.name == "triton")
    for in_fp8 in (False, True):
        args = _arguments([65], 16, 8, in_fp8)
        assert supports(*args) is None
        strided = args[0].mT.contiguous().mT
        assert supports(strided, *args[1:]).startswith("wants a cache with contiguous rows")
        assert supports(args[0], args[1].double(), *args[2:]) == "computes in float32"


def test_refuses_what_does_not_fit():
    args = _arguments([65], 16, 8, False)
    for i, wrong in [(0, args[0][:, :32]), (3, torch.ones(8)), (4, torch.ones(1, 3)), (2, torch.ones(1, 7))]:
        with pytest.raises(ValueError, match=r"norm_rope_append: want cache \[P, 64, C \+ R or W\], .* got \[\["):
            norm_rope_append(*args[:i], wrong, *args[i + 1 :])
    for i in (2, 4, 5, 6):
        with pytest.raises(ValueError, match=r"norm_rope_append: want 1 rows of everything, got 2"):
            norm_rope_append(*args[:i], torch.cat([args[i]] * 2), *args[i + 1 :])
    with pytest.raises(ValueError, match=r"got 23 of torch.float32 for C = 16 and R = 8"):
        norm_rope_append(args[0][..., 1:], *args[1:])
    with pytest.raises(ValueError, match=r"got 24 of torch.uint8 for C = 16 and R = 8"):
        norm_rope_append(args[0].byte(), *args[1:])
    with pytest.raises(TypeError, match="of one dtype, got torch.float32 and torch.bfloat16"):
        norm_rope_append(*args[:2], args[2].bfloat16(), *args[3:])
    with pytest.raises(TypeError, match="norm_rope_append: want int64 slots, got torch.int32"):
        norm_rope_append(*args[:6], args[6].int(), *args[7:])
