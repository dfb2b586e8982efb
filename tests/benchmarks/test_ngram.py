"""The vectorised Kneser-Ney model against its definition, written with dictionaries of tuples."""

import math
from collections import Counter, defaultdict

import numpy as np
import numpy.typing as npt
import pytest

from benchmark_scripts import load_script

VOCAB_SIZE = 32
ORDER = 5


ngram = load_script("ngram")


def corpus(seed: int, documents: int, length: int) -> npt.NDArray[np.uint16]:
    """Documents with skewed, partly predictable tokens, so that every order has counts of 1, 2, 3 and 4."""
    random = np.random.default_rng(seed)
    parts: list[npt.ArrayLike] = []
    for _ in range(documents):
        ids = 4 + (random.geometric(0.15, length) + np.repeat(random.integers(0, 9, length // 5 + 1), 5)[:length]) % 28
        parts += [[0], ids, [1]]
    return np.concatenate(parts).astype(np.uint16)


def ngrams(tokens: npt.NDArray[np.uint16]) -> list[tuple[int, ...]]:
    result = []
    history: list[int] = []
    for token in tokens.tolist():
        if token == 0:
            history = [0] * (ORDER - 1)
        else:
            result.append((*history[-(ORDER - 1) :], token))
            history.append(token)
    return result


def discount(counts: Counter[tuple[int, ...]], count: int) -> float:
    n = Counter(counts.values())
    try:
        y = n[1] / (n[1] + 2 * n[2])
        values = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
    except ZeroDivisionError:
        values = [-1.0]
    if any(not 0 <= value <= i for i, value in enumerate(values, start=1)):
        values = [0.5, 1.0, 1.5]
    return values[min(count, 3) - 1]


class DirectModel:
    """Counts of each order from sets of left neighbours, probabilities by recursion."""

    def __init__(self, tokens: npt.NDArray[np.uint16]) -> None:
        full = ngrams(tokens)
        self.counts: dict[int, Counter[tuple[int, ...]]] = {ORDER: Counter(full)}
        for order in range(1, ORDER):
            left: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
            for gram in full:
                left[gram[-order:]].add(gram[-order - 1])
            self.counts[order] = Counter({gram: len(tokens) for gram, tokens in left.items()})

    def probability(self, gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / VOCAB_SIZE
        counts = self.counts[len(gram)]
        followers = {g: c for g, c in counts.items() if g[:-1] == gram[:-1]}
        if not followers:
            return self.probability(gram[1:])
        total = sum(followers.values())
        gamma = sum(discount(counts, c) for c in followers.values()) / total
        count = followers.get(gram, 0)
        share = (count - discount(counts, count)) / total if count else 0.0
        return share + gamma * self.probability(gram[1:])


@pytest.mark.parametrize(("documents", "length"), [(12, 60), (1, 3)])
def test_matches_the_direct_definition(documents: int, length: int) -> None:
    train, heldout = corpus(0, documents, length), corpus(1, 2, 40)
    direct = DirectModel(train)
    expected = [direct.probability(gram) for gram in ngrams(heldout)]
    model = ngram.KneserNey(train, VOCAB_SIZE)
    np.testing.assert_allclose(model.probabilities(ngram.pack(heldout)), expected, rtol=1e-9, atol=0)
    assert model.bits(heldout) == pytest.approx(-sum(map(math.log2, expected)), rel=1e-9)


def test_the_synthetic_corpus_estimates_discounts() -> None:
    levels = ngram.KneserNey(corpus(0, 12, 60), VOCAB_SIZE).levels
    assert any(level.discounts != ngram.FALLBACK_DISCOUNTS for level in levels)


def test_probabilities_sum_to_one() -> None:
    train = corpus(0, 12, 60)
    assert ngram.check_sums(ngram.KneserNey(train, VOCAB_SIZE), train, num_contexts=20) < 1e-12


def test_no_ngram_spans_two_documents() -> None:
    keys = ngram.pack(np.array([0, 7, 1, 0, 8, 1], dtype=np.uint16))
    unpacked = [tuple(int(key) >> 12 * i & 0xFFF for i in range(4, -1, -1)) for key in keys]
    assert unpacked == [(0, 0, 0, 0, 7), (0, 0, 0, 7, 1), (0, 0, 0, 0, 8), (0, 0, 0, 8, 1)]


@pytest.mark.parametrize("ids", [[], [5, 1], [0, 5], [0, 4096, 1]])
def test_rejects_what_is_not_a_token_file(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ngram: want ids below 4096"):
        ngram.pack(np.array(ids, dtype=np.uint16))


def test_xz_pays_only_for_what_is_not_in_the_training_text() -> None:
    random = np.random.default_rng(0)
    train, other = (random.bytes(4000) for _ in range(2))
    filters = [{"id": ngram.lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 20}]
    assert ngram.xz_bits_per_byte(train, train, len(train), filters) < 0.2
    assert ngram.xz_bits_per_byte(train, other, len(other), filters) == pytest.approx(8, rel=0.01)
