"""Figures of the shipped model, on texts and a model small enough to check by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import deepfuse as df
from deepfuse.recipes.evaluate import WINDOW, bits_per_byte, known_words
from tiny_checkpoint import TINY


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["the cat sat on the mat"], 1.0),
        # the last word may be cut
        (["the cat sat on the matadored"], 1.0),
        (["the dog sat on the mat"], 4 / 5),
        (["THE Cat's. -- 1812 -- sat"], 1 / 2),
        # quotation marks belong to no word
        (["'The cat,' sat 'the mat' end"], 1.0),
        # a share of all words, not of texts
        (["the dog ran end", "the end"], 2 / 4),
        (["' '' end", "end", ""], 0.0),
        ([], 0.0),
    ],
)
def test_known_words(texts: list[str], share: float) -> None:
    assert known_words(iter(texts), "The cat sat\non the mat.") == share


@pytest.mark.parametrize("length", [2, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW + 77])
def test_bits_per_byte_is_the_loss_of_each_token_behind_its_window(length: int, model: df.Model) -> None:
    tokens = np.random.default_rng(length).integers(0, TINY.vocab_size, size=length).astype(np.uint16)
    ids = tokens.tolist()
    nats = 0.0
    for place in range(1, length):
        begin = (place - 1) // WINDOW * WINDOW
        if place == begin + 1:  # a window begins, at the last token of the one before
            scores = model.score([ids[begin : begin + WINDOW + 1]])[0]
        nats -= float(scores[place - begin - 1])
    # float32 sums of a thousand terms
    assert bits_per_byte(model, tokens, 1000) == pytest.approx(nats / math.log(2) / 1000, rel=1e-5)


@pytest.fixture(scope="module")
def model() -> df.Model:
    torch.manual_seed(0)
    config = replace(TINY, num_hidden_layers=2, max_position_embeddings=1024, initializer_range=0.2)
    return df.build(config, device="cpu", max_batch_size=2, compile=False)
