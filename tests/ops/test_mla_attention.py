"""Attention of sequences of different lengths: against PyTorch's attention and its gradient, sequence by sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from deepfuse.ir.interpreter import interpreted
from deepfuse.ops import mla_attention as module
from deepfuse.ops.mla_attention import _flash_cpu, _launch, mla_attention, mla_attention_ref
from deepfuse.ops.mla_attention_backward import _flash_cpu as _flash_cpu_backward
from deepfuse.ops.mla_attention_backward import _launch as _launch_backward
from deepfuse.ops.mla_attention_backward import mla_attention_backward_ref

pytestmark = pytest.mark.usefixtures("kernel_device")

PROVIDERS = {
    "reference": (mla_attention_ref, mla_attention_backward_ref),
    "triton": (_launch, _launch_backward),
}
if interpreted():
    PROVIDERS["torch"] = (_flash_cpu, _flash_cpu_backward)
every_provider = pytest.mark.parametrize(("forward", "backward"), PROVIDERS.values(), ids=PROVIDERS.keys())
LENGTHS = st.lists(
    # queries, and keys before them; a sequence without queries may have keys
    st.tuples(st.integers(0, 33), st.integers(0, 33)).filter(lambda pair: pair != (0, 0)),
    min_size=1,
    max_size=3,
)
WIDTHS = st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40))


def _arguments(lengths, H, N, R, V, dtype=torch.float32):
    """Arguments for sequences of (queries, keys before them), one after the other."""
    queries = torch.tensor([q for q, _ in lengths])
    keys = torch.tensor([q + before for q, before in lengths])
    T, S = int(queries.sum()), int(keys.sum())
    return (
        torch.randn(T, H, N + R, dtype=dtype),
        torch.randn(S, H, N + V, dtype=dtype),
        torch.randn(S, R, dtype=dtype),
        torch.nn.functional.pad(queries.cumsum(0), (1, 0)).to(torch.int32),
        (keys.cumsum(0) - keys).to(torch.int32),
        keys.to(torch.int32),
        (N + R) ** -0.5,
    )


def _torch_attention(q, kv, k_rope, q_start, k_start, k_len, scale):
    """What PyTorch's own attention and logsumexp say, in float64 and differentiable."""
    q, kv, k_rope = q.double(), kv.double(), k_rope.double()
    N = q.shape[2] - k_rope.shape[1]
    outs, lses = [], []
    for begin, end, key, K in zip(q_start[:-1], q_start[1:], k_start, k_len, strict=True):
        kv_KHX, k_rope_KR = kv[key : key + K], k_rope[key : key + K]
        k_HKD = torch.cat((kv_KHX[..., :N], k_rope_KR[:, None].expand(-1, q.shape[1], -1)), -1).transpose(0, 1)
        q_HQD, v_HKV = q[begin:end].transpose(0, 1), kv_KHX[..., N:].transpose(0, 1)
        place_Q1 = torch.arange(K - (end - begin), K)[:, None]
        mask = torch.arange(K) <= place_Q1
        out = torch.nn.functional.scaled_dot_product_attention(q_HQD, k_HKD, v_HKV, attn_mask=mask, scale=scale)
        scores = (q_HQD @ k_HKD.mT * scale).masked_fill(~mask, float("-inf"))
        outs.append(out.transpose(0, 1))
        lses.append(scores.logsumexp(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def _torch_gradients(dout, args):
    leaves = [t.double().requires_grad_() for t in args[:3]]
    out, _ = _torch_attention(*leaves, *args[3:])
    return torch.autograd.grad(out, leaves, dout.double(), materialize_grads=True)


@every_provider
@settings(max_examples=8)
@given(lengths=LENGTHS, widths=WIDTHS, seed=st.integers(0, 99))
def test_is_the_attention_of_pytorch_and_so_is_its_gradient(forward, backward, lengths, widths, seed):
    torch.manual_seed(seed)
    args = _arguments(lengths, *widths)
    out, lse = forward(*args)
    expected_out, expected_lse = _torch_attention(*args)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)

    dout = torch.randn_like(out)
    grads = backward(dout, *args[:3], out, lse, *args[3:])
    for actual, expected in zip(grads, _torch_gradients(dout, args), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "widths", "dtype"),
    # of one block and the next for few, some and many queries a sequence; the gradient of keys has other blocks for three
    # heads, and all gradients for wide heads of float32
    [
        ([(2, 130), (17, 0), (1, 0)], (2, 24, 8, 20), torch.bfloat16),
        ([(64, 1), (20, 70)], (2, 24, 8, 20), torch.bfloat16),
        ([(70, 75), (129, 0)], (2, 24, 8, 20), torch.bfloat16),
        ([(33, 75), (129, 0)], (3, 8, 4, 8), torch.bfloat16),
        ([(34, 1), (20, 20)], (2, 24, 8, 20), torch.float32),
        ([(17, 16), (20, 0)], (1, 72, 8, 40), torch.float32),
    ],
    ids=["decode", "chunk", "prompt", "three heads", "float32", "wide float32"],
)
def test_kernel_error_is_at_most_a_few_times_that_of_the_reference(lengths, widths, dtype):
    # in bfloat16 the roundings of inputs and results decide; in float32 those of sums, which a reference with 16 lanes of AVX-512
    # adds in as many chains, so that it errs 16 ** 0.5 times less than one chain may
    times = 2.0 if dtype == torch.bfloat16 else 4.0
    args = _arguments(lengths, *widths, dtype)
    wide = tuple(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args)
    actual, reference, exact = _launch(*args), mla_attention_ref(*args), mla_attention_ref(*wide)
    for values in zip(actual, reference, exact, strict=True):
        assert_as_accurate(*values, times)

    dout = torch.randn_like(actual[0])
    actual = _launch_backward(dout, *args[:3], *reference, *args[3:])
    exact = mla_attention_backward_ref(dout.double(), *wide[:3], *exact, *wide[3:])
    reference = mla_attention_backward_ref(dout, *args[:3], *reference, *args[3:])
    for grads in zip(actual, reference, exact, strict=True):
        assert_as_accurate(*grads, times)


@every_provider
def test_rows_of_no_sequence_are_not_read(forward, backward):
    q, kv, k_rope, q_start, k_start, k_len, scale = _arguments([(3, 0), (5, 4), (30, 2)], 2, 8, 4, 8)
    # keys apart and in another order, queries behind the last
    places = torch.tensor([70, 50, 5], dtype=torch.int32)
    padded = [torch.full((size, *t.shape[1:]), float("nan")) for size, t in ((60, q), (80, kv), (80, k_rope))]
    padded[0][: q.shape[0]] = q
    for t, rows in zip(padded[1:], (kv, k_rope), strict=True):
        for place, start, length in zip(places, k_start, k_len, strict=True):
            t[place : place + length] = rows[start : start + length]

    out, lse = forward(q, kv, k_rope, q_start, k_start, k_len, scale)
    padded_out, padded_lse = forward(*padded, q_start, places, k_len, scale)
    torch.testing.assert_close(padded_out[: q.shape[0]], out)
    torch.testing.assert_close(padded_lse[: q.shape[0]], lse)
    assert not padded_out[q.shape[0] :].any() and (padded_lse[q.shape[0] :] == float("-inf")).all()

    dout = torch.randn_like(out)
    dq, dkv, dk_rope = backward(dout, q, kv, k_rope, out, lse, q_start, k_start, k_len, scale)
    dout = torch.cat((dout, torch.ones_like(padded_out[q.shape[0] :])))
    grads = backward(dout, *padded, padded_out, padded_lse, q_start, places, k_len, scale)
    torch.testing.assert_close(grads[0], torch.cat((dq, torch.zeros(60 - q.shape[0], *q.shape[1:]))))
    for actual, expected in zip(grads[1:], (dkv, dk_rope), strict=True):
        for place, start, length in zip(places, k_start, k_len, strict=True):
            torch.testing.assert_close(actual[place : place + length], expected[start : start + length])
            actual[place : place + length] = 0.0
        assert not actual.any()


@every_provider
def test_one_key_gives_its_value(forward, backward):
    args = _arguments([(1, 0), (1, 0)], 2, 8, 4, 8)
    out, lse = forward(*args)
    torch.testing.assert_close(out, args[1][..., 8:])
    dq, dkv, dk_rope = backward(torch.ones_like(out), *args[:3], out, lse, *args[3:])
    torch.testing.assert_close(dkv[..., 8:], torch.ones_like(out))
    for t in (dq, dkv[..., :8], dk_rope):
        torch.testing.assert_close(t, torch.zeros_like(t), atol=1e-6, rtol=0.0)


@every_provider
def test_nothing_in_gives_nothing_out(forward, backward):
    args = _arguments([(0, 3)], 2, 8, 4, 8)
    out, lse = forward(*args)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)
    dq, dkv, dk_rope = backward(out, *args[:3], out, lse, *args[3:])
    assert dq.numel() == 0 and not dkv.any() and not dk_rope.any()


@every_provider
def test_large_scores_do_not_overflow(forward, backward):
    q, *rest = _arguments([(40, 3)], 1, 8, 4, 8)
    out, lse = forward(q * 1e4, *rest)
    assert out.isfinite().all() and lse.isfinite().all()
    for grad in backward(torch.ones_like(out), q * 1e4, *rest[:2], out, lse, *rest[2:]):
        assert grad.isfinite().all()


@every_provider
def test_takes_any_strides(forward, backward):
    # keys as wide as values, so that no provider pads
    args = _arguments([(5, 3), (20, 0)], 2, 8, 4, 12)
    strided = [t.mT.contiguous().mT for t in args[:3]]
    out, lse = forward(*args)
    torch.testing.assert_close(forward(*strided, *args[3:])[0], out)
    # the gradient of a sum is expanded
    ones = torch.ones((), dtype=out.dtype).expand(out.shape)
    expected = backward(ones.contiguous(), *args[:3], out, lse, *args[3:])
    for a, e in zip(backward(ones, *strided, out, lse, *args[3:]), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_blocks_that_end_near_the_diagonal_are_masked_to_the_key():
    # first queries of a block that see one key less, as many and one more than whole blocks of 32 keys
    args = _arguments([(2, before) for before in range(29, 34)], 1, 4, 4, 4)
    actual, expected = _launch(*args), mla_attention_ref(*args)
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected[0])
    grad_args = dout, *args[:3], *expected, *args[3:]
    torch.testing.assert_close(_launch_backward(*grad_args), mla_attention_backward_ref(*grad_args))


@pytest.mark.skipif(not interpreted(), reason="of the CPU's provider: with a GPU, tensors are made there")
def test_sequences_of_equal_lengths_go_into_one_call(monkeypatch):
    batches = []
    flash = module.flash_attention_cpu
    monkeypatch.setattr(
        module, "flash_attention_cpu", lambda q, *a, **k: (batches.append(q.shape[0]), flash(q, *a, **k))[1]
    )
    _flash_cpu(*_arguments([(4, 0), (4, 0), (2, 5), (4, 0), (2, 5), (3, 0)], 2, 8, 4, 8))
    assert sorted(batches) == [1, 2, 3]


def test_float64_and_wide_heads_go_to_the_reference():
    args = _arguments([(3, 0)], 1, 8, 4, 8)
    wide = tuple(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args)
    assert mla_attention.choose(args).provider.name == ("torch" if interpreted() else "triton")
    assert mla_attention.choose(wide).provider.name == "reference"
    supports = {p.name: p.supports for p in mla_attention.providers}
    assert supports["triton"](*args) is None
    assert supports["triton"](*wide) == "computes in float32 at most"
    assert "at most 2560 bytes a head (padded), not 4160" in supports["triton"](*_arguments([(1, 0)], 1, 512, 4, 512))


def test_refuses_what_does_not_fit():
    q, kv, k_rope, *rest = _arguments([(3, 0)], 2, 8, 4, 8)
    with pytest.raises(ValueError, match=r"mla_attention: want q \[T, H, N \+ R\].* got \[\[3, 2, 12\], \[3, 1, 16\]"):
        mla_attention(q, kv[:, :1], k_rope, *rest)
    with pytest.raises(ValueError, match=r"k_rope \[S, R\].*\[3, 12\]"):
        mla_attention(q, kv, torch.ones(3, 12), *rest)
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32, torch.float32 and torch.bfloat16"):
        mla_attention(q, kv, k_rope.bfloat16(), *rest)
    for wrong in [
        (kv[:2], k_rope, *rest),
        (kv, k_rope, rest[0][:1], *rest[1:]),
        (kv, k_rope, *rest[:2], rest[2][:0], 1.0),
    ]:
        with pytest.raises(ValueError, match="mla_attention: want .* got"):
            mla_attention(q, *wrong)
