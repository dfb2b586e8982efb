import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from deepfuse.ops import sample as module
from deepfuse.ops.sample import gumbel, philox, sample, sample_ref

PROVIDERS = {p.name: p for p in sample.providers}
TRITON = PROVIDERS["triton"].fn
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("kernel_device")
every_run = pytest.mark.parametrize("run", [sample, sample_ref, TRITON], ids=["op", "reference", "triton"])


def _arguments(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, position: int = 0
) -> tuple[Tensor, ...]:
    """The same settings for every row; ``position`` counts up from row to row."""
    B = logits.shape[0]
    return (
        logits,
        torch.full((B,), temperature),
        torch.full((B,), top_k),
        torch.full((B,), top_p),
        torch.full((B,), seed),
        torch.arange(B) + position,
    )


def _draws(logits: list[float], count: int, **settings) -> Tensor:
    return sample(*_arguments(torch.tensor(logits).expand(count, -1), **settings))


def _chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """In standard deviations from its mean."""
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert observed[probabilities == 0].sum() == 0
    observed, expected = observed[probabilities > 0], len(tokens) * probabilities[probabilities > 0].double()
    freedom = len(expected) - 1
    return ((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5).item()


# kat_vectors of Random123: counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, result):
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(word.item() for word in words) == result


@triton.jit
def _philox_kernel(seed_ptr, counter_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    c0, c1, c2, c3 = tl.philox(
        tl.load(seed_ptr),
        tl.load(counter_ptr + n).to(tl.uint32),
        tl.load(counter_ptr + N + n).to(tl.uint32),
        tl.load(counter_ptr + 2 * N + n).to(tl.uint32),
        tl.load(counter_ptr + 3 * N + n).to(tl.uint32),
    )
    tl.store(out_ptr + n, c0.to(tl.int64))
    tl.store(out_ptr + N + n, c1.to(tl.int64))
    tl.store(out_ptr + 2 * N + n, c2.to(tl.int64))
    tl.store(out_ptr + 3 * N + n, c3.to(tl.int64))


def test_philox_is_that_of_triton():
    counter, seed = torch.randint(0, 2**32, (4, 64)), torch.randint(-(2**63), 2**63 - 1, (1,))
    out = torch.empty_like(counter)
    _philox_kernel[(1,)](seed, counter, out, N=64)
    words = philox(tuple(counter), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    assert torch.equal(torch.stack(words), out)


@triton.jit
def _gumbel_kernel(bits_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, module._gumbel(tl.load(bits_ptr + n).to(tl.uint32)))


def test_noise_of_the_kernel_is_accurate_for_small_and_large_bits():
    bits = torch.cat([torch.tensor([0, 1, 2**30 - 1, 2**30, 2**31, 2**32 - 1]), torch.randint(0, 2**32, (506,))])
    out = torch.empty(512)
    _gumbel_kernel[(1,)](bits, out, N=512)
    exact = -torch.log(-torch.log1p(-(bits.double() + 0.5) / 2**32))
    assert out.isfinite().all()
    torch.testing.assert_close(out.double()[exact > -1], exact[exact > -1], atol=1e-6, rtol=1e-6)


def test_noise_in_float32_keeps_its_tail():
    seed, position = torch.tensor([5]), torch.tensor([7])
    noise, exact = (gumbel(seed, position, 200_000, dtype) for dtype in (torch.float32, torch.float64))
    assert noise.isfinite().all()
    # small noise, which wins against nothing, is coarse: there v is next to 1
    torch.testing.assert_close(noise.double()[exact > -1], exact[exact > -1], atol=1e-6, rtol=1e-6)
    # the largest of n lies around log n
    assert 10 < noise.max() < 20


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (1.3, 6, 0.7)]
)
def test_draws_follow_the_softmax_of_what_is_kept(temperature, top_k, top_p):
    logits = [2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.7]
    p = (torch.tensor(logits) / temperature).softmax(0)
    order = p.argsort(descending=True)
    kept = order[: top_k or None]
    before = (p[kept] / p[kept].sum()).cumsum(0) - p[kept] / p[kept].sum()
    kept = kept[before < top_p]
    expected = torch.zeros_like(p).index_put((kept,), p[kept] / p[kept].sum())
    tokens = _draws(logits, 20_000, temperature=temperature, top_k=top_k, top_p=top_p, seed=123)
    assert abs(_chi_square(tokens, expected)) < 4


def test_draws_of_different_seeds_at_one_position_are_independent():
    logits = torch.zeros(20_000, 6)
    seeds = torch.arange(20_000)
    arguments = (*_arguments(logits)[:4], seeds, torch.full_like(seeds, 3))
    assert abs(_chi_square(sample(*arguments), torch.full((6,), 1 / 6))) < 4


@every_run
def test_the_same_seed_and_position_draw_the_same_whatever_the_batch(run):
    logits = torch.randn(4, 50)
    together = run(*_arguments(logits, seed=4))
    assert torch.equal(run(*_arguments(logits, seed=4)), together)
    alone = [run(*(a[i : i + 1] for a in _arguments(logits, seed=4))) for i in range(4)]
    assert torch.equal(torch.cat(alone), together)


@every_run
@pytest.mark.parametrize("changed", ["seed", "position"])
@pytest.mark.parametrize("by", [1, 2**32], ids=["low word", "high word"])
def test_another_seed_or_position_draws_anew(run, changed, by):
    logits = torch.zeros(4, 1000)
    assert not torch.equal(run(*_arguments(logits)), run(*_arguments(logits, **{changed: 4 * by})))


@every_run
def test_top_1_and_no_mass_and_temperature_0_are_greedy(run):
    logits = torch.randn(2, 60)
    greedy = logits.argmax(-1)
    for one in ({"top_k": 1}, {"top_p": 0.0}, {"temperature": 0.0}, {"temperature": 1e-38}):
        assert torch.equal(run(*_arguments(logits, **one)), greedy), one


@every_run
def test_greedy_takes_the_lowest_of_equal_logits_past_any_block(run):
    logits = torch.zeros(3, 20_000)
    logits[0, [9, 12_000]] = 1.0
    logits[1, [12_000, 19_999]] = 1.0
    assert run(*_arguments(logits, temperature=0.0)).tolist() == [9, 12_000, 0]


@pytest.mark.parametrize(
    ("one", "kept"),
    [
        # the first is twice as likely as each of the next three, which are equal, as are zeros of either sign
        ({"top_k": 2}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0, 1, 2, 3}),
        ({"top_p": 0.36}, {0}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_k": 4, "top_p": 0.999}, {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_equal_logits_are_kept_or_dropped_together(one, kept):
    logits = torch.tensor([0.6931472, 0.0, -0.0, 0.0, -1.0])
    assert set(_draws(logits.tolist(), 100, **one).tolist()) == kept
    arguments = _arguments(logits.expand(2, -1), **one)
    assert torch.equal(TRITON(*arguments), sample_ref(*arguments))


@every_run
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("one", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_nan_is_never_drawn_and_rows_without_a_number_give_0(run, temperature, one):
    logits = torch.tensor(
        [
            [NAN, 1.0, NAN, -INF],
            [-INF, NAN, -INF, -5.0],
            [NAN, NAN, NAN, NAN],
            [-INF, -INF, -INF, -INF],
            [0, INF, 1, NAN],
        ]
    )
    tokens = run(*_arguments(logits, temperature=temperature, **one))
    assert tokens.tolist() == [1, 3, 0, 0, 1]
    # past any block too
    assert run(*_arguments(torch.full((1, 5000), -INF), temperature=temperature)).tolist() == [0]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logits=st.lists(st.sampled_from([-INF, -8.0, -2.0, -0.5, 0.0, 0.25, 1.0, 1.5, 3.0]), min_size=1, max_size=70),
    noise=st.sampled_from([0.0, 1.0]),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_k=st.integers(-1, 80),
    top_p=st.floats(0.003, 1.1),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**62),
)
def test_kernel_draws_what_the_reference_draws(logits, noise, temperature, top_k, top_p, seed, position):
    x = torch.tensor(logits) + noise * torch.randn(len(logits))
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "position": position}
    arguments = _arguments(x.expand(2, -1), **settings)
    assert torch.equal(TRITON(*arguments), sample_ref(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("V", "settings"),
    [(163_840, {}), (9000, {"top_k": 1000, "top_p": 0.9, "temperature": 0.9})],
    ids=["large", "small"],
)
def test_kernel_takes_large_vocabularies_and_strided_rows(V, settings, dtype):
    logits = torch.randn(2, V + 100).mul(2).to(dtype)[:, 37:-63]
    arguments = _arguments(logits, seed=11, **settings)
    assert torch.equal(TRITON(*arguments), sample_ref(*arguments))


def test_kernel_takes_transposed_logits_and_long_words():
    arguments = _arguments(torch.randn(500, 3).t(), seed=-(3 << 40), position=5 << 40)
    assert torch.equal(TRITON(*arguments), sample_ref(*arguments))


@every_run
def test_infinite_logits_are_one_another_s_equals(run):
    tokens = run(*_arguments(torch.tensor([0.0, INF, 3e38, INF]).expand(12, -1)))
    assert set(tokens.tolist()) == {1, 3}


@every_run
def test_top_p_is_of_the_mass_at_this_temperature(run):
    logits, temperature = torch.tensor([0.0, -1.4]), 1.6
    first = (logits / temperature).softmax(0)[0].item()
    # where the second of two tokens is drawn if it is kept
    second = sample_ref(*_arguments(logits.expand(50, -1), temperature=temperature)).nonzero()[:2, 0]
    for top_p, drawn in [(first * 0.995, 0), (first * 1.005, 1)]:
        arguments = _arguments(logits.expand(50, -1), temperature=temperature, top_p=top_p)
        assert run(*(a[second] for a in arguments)).tolist() == [drawn, drawn]


def test_idle_filters_are_left_out_to_the_same_end():
    logits = torch.randn(4, 100)
    for temperature in ([0.0] * 4, [0.0, 1.0, 0.0, 2.0], [1.0] * 4):
        arguments = (logits, torch.tensor(temperature), *_arguments(logits)[2:])
        assert torch.equal(PROVIDERS["torch"].fn(*arguments), sample_ref(*arguments))


def test_kernel_refuses_what_it_would_round():
    rows = _arguments(torch.zeros(1, 4))[1:]
    supports = PROVIDERS["triton"].supports
    assert supports(torch.zeros(1, 4), *rows) is None
    assert "float32" in supports(torch.zeros(1, 4, dtype=torch.float64), *rows)
    assert "2**24" in supports(torch.zeros(1, 2**24 + 1, device="meta"), *rows)


def test_refuses_what_does_not_fit():
    logits, *rows = _arguments(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"logits \[B, V\] with V >= 1 .* got \[\[2\], "):
        sample(logits[:, 0], *rows)
    with pytest.raises(ValueError, match=r"got \[\[2, 0\], "):
        sample(logits[:, :0], *rows)
    with pytest.raises(ValueError, match="want 2 temperatures, seeds and so on, got 1"):
        sample(logits, rows[0][:1], *rows[1:])
    with pytest.raises(TypeError, match="int64 top_k, seed and position, got"):
        sample(logits, rows[0], rows[1].int(), *rows[2:])
