"""One step of absorbed attention: against PyTorch's attention on the rows of each sequence, and expanded attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from decode_arguments import decode_arguments
from deepfuse.ops import mla_decode_splits as module
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.ops.mla_decode import mla_decode, mla_decode_ref
from deepfuse.ops.mla_decode_splits import mixed_attention, num_splits_for
from uninitialized import uninitialized_memory_is_nan

pytestmark = pytest.mark.usefixtures("kernel_device")

every_provider = pytest.mark.parametrize("decode", [mla_decode_ref, mixed_attention], ids=["reference", "triton"])


def _rows(cache, table, seqlens):
    return [cache[pages].flatten(0, 1)[:length] for pages, length in zip(table, seqlens, strict=True)]


def _torch_decode(q_latent, q_rope, cache, table, seqlens, scale):
    """What PyTorch's own attention says, in float64."""
    C = q_latent.shape[2]
    outs = []
    for q_C, q_R, rows in zip(q_latent.double(), q_rope.double(), _rows(cache.double(), table, seqlens), strict=True):
        q_HD = torch.cat((q_C, q_R), -1)
        out = torch.nn.functional.scaled_dot_product_attention(q_HD[None], rows[None], rows[None, :, :C], scale=scale)
        outs.append(out[0] if rows.shape[0] else torch.zeros_like(q_C))
    return torch.stack(outs)


@every_provider
@settings(max_examples=12)
@given(
    seqlens=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_is_the_attention_of_pytorch_over_the_rows_of_each_sequence(decode, seqlens, widths, seed):
    torch.manual_seed(seed)
    args = decode_arguments(seqlens, 4, *widths)
    torch.testing.assert_close(decode(*args).double(), _torch_decode(*args), atol=1e-5, rtol=1e-5)


@every_provider
def test_equals_expanded_attention(decode):
    B, H, C, R, N, V, seqlens = 3, 2, 32, 8, 16, 24, [1, 64, 100]
    _, q_rope, cache, table, lengths, scale = decode_arguments(seqlens, 2, H, C, R)
    q_nope, kv_b = torch.randn(B, H, N), torch.randn(H, N + V, C) / C**0.5
    mixed = decode(torch.einsum("bhn,hnc->bhc", q_nope, kv_b[:, :N]), q_rope, cache, table, lengths, scale)
    absorbed = torch.einsum("bhc,hvc->bhv", mixed, kv_b[:, N:])

    rows = torch.cat(_rows(cache, table, lengths))
    places = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)[:-1]
    expanded, _ = mla_attention(
        torch.cat((q_nope, q_rope), -1),
        torch.einsum("sc,hxc->shx", rows[:, :C], kv_b),
        rows[:, C:].contiguous(),
        torch.arange(B + 1, dtype=torch.int32),
        places,
        lengths,
        scale,
    )
    torch.testing.assert_close(absorbed, expanded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# all heads in one block; two blocks, the last with one head
@pytest.mark.parametrize(("H", "C", "R"), [(5, 100, 20), (65, 128, 64)])
def test_kernel_error_is_at_most_twice_that_of_the_reference(H, C, R, dtype):
    args = decode_arguments([150, 3], 3, H, C, R, dtype)
    assert_as_accurate(mixed_attention(*args), mla_decode_ref(*args), _torch_decode(*args))


@pytest.mark.parametrize("num_splits", [1, 2, 5, 7])
def test_any_number_of_splits_gives_the_same(monkeypatch, num_splits):
    # more splits than pages, so that some are empty
    args = decode_arguments([300, 64, 1, 0], 5, 3, 16, 8)
    monkeypatch.setattr(module, "num_splits_for", lambda num_programs, P: num_splits)
    with uninitialized_memory_is_nan():
        out = mixed_attention(*args)
    torch.testing.assert_close(out, mla_decode_ref(*args))


def test_splits_fill_the_device_as_far_as_there_are_pages():
    assert [num_splits_for(2, P) for P in (1, 2, 64, 1024)] == [1, 1, 32, 132]
    assert [num_splits_for(programs, 1024) for programs in (1, 100, 256, 264, 265, 10000)] == [264, 2, 1, 1, 1, 1]


@every_provider
def test_a_padding_row_gives_zeros(decode):
    args = decode_arguments([0, 0], 2, 3, 16, 8)
    assert torch.equal(decode(*args), torch.zeros(2, 3, 16))


@every_provider
def test_nothing_in_gives_nothing_out(decode):
    q_latent, q_rope, cache, table, seqlens, scale = decode_arguments([3], 1, 2, 16, 8)
    assert decode(q_latent[:0], q_rope[:0], cache, table[:0], seqlens[:0], scale).shape == (0, 2, 16)


def test_large_scores_do_not_overflow():
    q_latent, *rest = decode_arguments([100], 2, 3, 16, 8)
    torch.testing.assert_close(mixed_attention(q_latent * 1e4, *rest), mla_decode_ref(q_latent * 1e4, *rest))


def test_kernel_takes_one_layer_of_a_cache_of_many():
    args = decode_arguments([70, 10], 2, 3, 16, 8)
    layers = torch.full((args[2].shape[0], 3, PAGE_SIZE, 24), float("nan"))
    layers[:, 1] = args[2]
    q_latent = args[0].mT.contiguous().mT
    assert torch.equal(mixed_attention(q_latent, args[1], layers[:, 1], *args[3:]), mixed_attention(*args))


def test_kernel_refuses_what_it_cannot_hold():
    supports = next(p.supports for p in mla_decode.providers if p.name == "triton")
    args = decode_arguments([3], 1, 2, 16, 8)
    assert supports(*args) is None
    assert supports(*[t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]) == (
        "computes in float32 at most"
    )
    assert supports(*decode_arguments([3], 1, 1, 513, 8)) == "a latent of at most 512 and 64 fits, not 513 and 8"
    q_latent, q_rope, cache, *rest = args
    assert supports(q_latent, q_rope, cache.mT.contiguous().mT, *rest).startswith("wants a cache with contiguous rows")


def test_refuses_what_does_not_fit():
    q_latent, q_rope, cache, table, seqlens, scale = decode_arguments([3, 4], 1, 2, 16, 8)
    with pytest.raises(ValueError, match=r"mla_decode: want .* cache \[pages, 64, C \+ R\].*got .*\[3, 32, 24\]"):
        mla_decode(q_latent, q_rope, cache[:, :32], table, seqlens, scale)
    with pytest.raises(ValueError, match=r"seqlens \[B\], got .*\[1\]\]"):
        mla_decode(q_latent, q_rope, cache, table, seqlens[:1], scale)
    with pytest.raises(TypeError, match=r"of one dtype, got torch.float32, torch.float32 and torch.bfloat16"):
        mla_decode(q_latent, q_rope, cache.bfloat16(), table, seqlens, scale)
