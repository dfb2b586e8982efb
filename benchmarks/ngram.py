"""Baselines for the small language model: a 5-gram model over the same BPE tokens, and xz.

The 5-gram model is interpolated modified Kneser-Ney (three discounts per order, S. F. Chen and J. Goodman, "An
Empirical Study of Smoothing Techniques for Language Modeling", 1998). With h' for the context h without its first token:

    P_k(w | h) = (c(hw) - D(c(hw))) / c(h.) + gamma(h) P_{k-1}(w | h'),   gamma(h) = sum_w D(c(hw)) / c(h.)
    P_k(w | h) = P_{k-1}(w | h')  where h was never seen,                  P_0(w) = 1 / vocabulary

c counts occurrences at order 5 and, below, the different tokens seen to the left (continuation counts). D takes three
values, for c = 1, 2 and 3 or more, estimated from the counts of counts n_1..n_4 of the order:
Y = n_1 / (n_1 + 2 n_2), D_1 = 1 - 2 Y n_2 / n_1, D_2 = 2 - 3 Y n_3 / n_2, D_3 = 3 - 4 Y n_4 / n_3.

A token has 12 bits, so a 5-gram is one uint64 and a shorter n-gram its low bits. A document is preceded by four
begin_of_text tokens, every later token including end_of_text is predicted, and no n-gram spans two documents.

Both baselines are in bits per byte of the held-out text. xz gets the training text first:
8 * (len(xz(train + heldout)) - len(xz(train))) / len(heldout).
"""

import argparse
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from deepfuse.recipes.corpus import read_documents
from deepfuse.recipes.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, VOCAB_SIZE

ORDER = 5
TOKEN_BITS = np.uint64(12)

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Used for an order whose counts of counts give no valid estimate, which happens to the unigrams: with a small
vocabulary next to no token has as few as four different left neighbours."""

DICTIONARY_BYTES = 64 << 20
"""What preset 9 sets anyway, with or without "extreme", stated because the comparison needs it: larger than the training text, so that no part of it is out of reach of a match."""

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One order: the n-grams seen (sorted), what each adds to P_k, and the contexts (sorted) with their gamma."""

    keys: Keys
    shares: Floats
    contexts: Keys
    gammas: Floats
    discounts: tuple[float, float, float]


class KneserNey:
    """A 5-gram model; `levels[k - 1]` belongs to order k."""

    def __init__(self, tokens: npt.NDArray[np.uint16], vocab_size: int = VOCAB_SIZE) -> None:
        self.vocab_size = vocab_size
        keys, counts = np.unique(pack(tokens), return_counts=True)
        levels = [_level(keys, counts)]
        for order in range(ORDER - 1, 0, -1):
            # every distinct longer n-gram is one distinct left neighbour of its suffix
            keys, counts = np.unique(_suffix(keys, order), return_counts=True)
            levels.append(_level(keys, counts))
        self.levels = levels[::-1]

    def probabilities(self, keys: Keys) -> Floats:
        """P(last token | the four before it) of packed 5-grams."""
        result = np.full(keys.shape, 1.0 / self.vocab_size)
        for order, level in enumerate(self.levels, start=1):
            ngrams = _suffix(keys, order)
            in_contexts, context = _find(level.contexts, ngrams >> TOKEN_BITS)
            in_keys, ngram = _find(level.keys, ngrams)
            # an unseen context has gamma 1: the shorter context answers alone
            result *= np.where(in_contexts, level.gammas[context], 1.0)
            result += np.where(in_keys, level.shares[ngram], 0.0)
        return result

    def bits(self, tokens: npt.NDArray[np.uint16]) -> float:
        """Bits to encode a token array: every token but begin_of_text."""
        return float(-np.log2(self.probabilities(pack(tokens))).sum())


def pack(tokens: npt.NDArray[np.uint16]) -> Keys:
    """The 5-grams that end at each predicted token, in order, each as 5 x 12 bits with the last token lowest.

    Raises:
        ValueError: The array is not whole documents, or an id does not fit 12 bits.
    """
    ids = tokens.astype(np.uint64)
    if len(ids) == 0 or ids[0] != BEGIN_OF_TEXT or ids[-1] != END_OF_TEXT or ids.max() >= 1 << int(TOKEN_BITS):
        raise ValueError(
            f"ngram: want ids below {1 << int(TOKEN_BITS)}, {BEGIN_OF_TEXT} first and {END_OF_TEXT} last, "
            f"got {tokens[:3].tolist()}..{tokens[-3:].tolist()}; write the file with recipes/tokenizer.py"
        )
    starts = np.flatnonzero(ids == BEGIN_OF_TEXT)
    padded = np.insert(ids, np.repeat(starts, ORDER - 2), BEGIN_OF_TEXT)
    keys = np.zeros(len(padded) - ORDER + 1, dtype=np.uint64)
    for position in range(ORDER):
        keys = (keys << TOKEN_BITS) | padded[position : position + len(keys)]
    return keys[padded[ORDER - 1 :] != BEGIN_OF_TEXT]


def check_sums(model: KneserNey, tokens: npt.NDArray[np.uint16], num_contexts: int = 8) -> float:
    """Sum the model over the whole vocabulary in a few contexts; returns the largest distance from 1.

    Half of the contexts are taken from the tokens, half are random and so mostly unseen at the higher orders.
    """
    random = np.random.default_rng(0)
    seen = random.choice(pack(tokens), num_contexts // 2) >> TOKEN_BITS
    ids = random.integers(0, model.vocab_size, (num_contexts - len(seen), ORDER - 1)).astype(np.uint64)
    unseen = np.bitwise_or.reduce(ids << (TOKEN_BITS * np.arange(ORDER - 1, dtype=np.uint64)), axis=1)
    contexts = np.concatenate([seen, unseen])
    keys = (contexts[:, None] << TOKEN_BITS) | np.arange(model.vocab_size, dtype=np.uint64)
    error = float(np.abs(model.probabilities(keys).sum(axis=1) - 1.0).max())
    assert error < 1e-9, error
    return error


def xz_bits_per_byte(train: bytes, heldout: bytes, num_bytes: int, filters: list[dict[str, int]]) -> float:
    """Extra bits that xz needs for the held-out text after the training text, per byte of num_bytes."""
    both, alone = (len(lzma.compress(text, filters=filters)) for text in (train + heldout, train))
    return 8 * (both - alone) / num_bytes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="5-gram and xz baselines in bits per byte of held-out text.")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where recipes/tokenizer.py wrote its files")
    parser.add_argument("--json", type=Path, help="where to write the three numbers")
    args = parser.parse_args(argv)
    tokens = {split: np.load(args.folder / f"{split}.npy") for split in ("train", "heldout")}
    documents = {split: read_documents(args.folder / f"{split}.txt") for split in tokens}
    for split, array in tokens.items():
        if (ends := int((array == END_OF_TEXT).sum())) != len(documents[split]):
            raise ValueError(
                f"ngram: want {len(documents[split])} documents in {split}.npy, got {ends}; encode it again"
            )
    heldout_bytes = sum(len(text.encode()) for text in documents["heldout"])

    model = KneserNey(tokens["train"])
    ngram_bpb = model.bits(tokens["heldout"]) / heldout_bytes
    sum_error = check_sums(model, tokens["heldout"])
    # paragraphs are single lines, so an empty line marks the end of a document as one token does for the 5-grams
    train, heldout = ("".join(f"{text}\n\n" for text in documents[split]).encode() for split in ("train", "heldout"))
    presets = {"xz -9": 9, "xz -9e": 9 | lzma.PRESET_EXTREME}
    xz_bpb = {
        name: xz_bits_per_byte(
            train, heldout, heldout_bytes, [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": DICTIONARY_BYTES}]
        )
        for name, preset in presets.items()
    }

    table = Table("baseline", "bits per byte", title=f"{heldout_bytes} bytes, {len(tokens['heldout'])} held-out tokens")
    table.add_row("5-gram, interpolated modified Kneser-Ney", f"{ngram_bpb:.4f}")
    for name, value in xz_bpb.items():
        table.add_row(f"{name}, dictionary {DICTIONARY_BYTES >> 20} MiB", f"{value:.4f}")
    console = Console()
    console.print(table)
    for order, level in enumerate(model.levels, start=1):
        discounts = " ".join(f"{value:.3f}" for value in level.discounts)
        console.print(f"order {order}: {len(level.keys)} n-grams, discounts {discounts}", highlight=False)
    console.print(f"sums over the vocabulary differ from 1 by at most {sum_error:.1e}", highlight=False)
    if args.json:
        result = {"ngram5_kneser_ney_bpb": ngram_bpb, "xz9_bpb": xz_bpb["xz -9e"], "heldout_bytes": heldout_bytes}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _level(keys: Keys, counts: npt.NDArray[np.int64]) -> _Level:
    contexts, starts = np.unique(keys >> TOKEN_BITS, return_index=True)
    discounts = _discounts(counts)
    discount = np.asarray((0.0, *discounts))[np.minimum(counts, 3)]
    totals = np.add.reduceat(counts, starts)
    spans = np.diff(np.append(starts, len(keys)))
    return _Level(
        keys=keys,
        shares=(counts - discount) / np.repeat(totals, spans),
        contexts=contexts,
        gammas=np.add.reduceat(discount, starts) / totals,
        discounts=discounts,
    )


def _discounts(counts: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if not n1 * n2 * n3:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimate = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    valid = all(0 <= value <= count for count, value in enumerate(estimate, start=1))
    return estimate if valid else FALLBACK_DISCOUNTS


def _suffix(keys: Keys, order: int) -> Keys:
    return keys & ((np.uint64(1) << (TOKEN_BITS * np.uint64(order))) - np.uint64(1))


def _find(table: Keys, wanted: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
    """Whether each wanted key is in the sorted table, and an index that is its place if so."""
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return table[index] == wanted, index


if __name__ == "__main__":
    main()
