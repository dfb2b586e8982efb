"""The tokenizer: round trip, special ids, determinism, and that transformers reads the same file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deepfuse.recipes import corpus
from deepfuse.recipes import tokenizer as recipe

DOCUMENTS = [
    f"The {word} of the Union in 18{n}, and {word}s--once more.\nIt is so." for n, word in enumerate("abcdef" * 9)
]
VOCAB_SIZE = 285

TOKENIZER = recipe.train_tokenizer(DOCUMENTS, VOCAB_SIZE)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < VOCAB_SIZE


def test_special_tokens_have_the_first_ids() -> None:
    assert TOKENIZER.encode("".join(recipe.SPECIAL_TOKENS)).ids == [0, 1, 2, 3]
    assert [TOKENIZER.token_to_id(token) for token in recipe.SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert recipe.SPECIAL_TOKENS[recipe.END_OF_TEXT] == corpus.SEPARATOR


def test_nothing_is_added_to_the_ids() -> None:
    assert TOKENIZER.encode("so").ids == TOKENIZER.encode("so", add_special_tokens=False).ids
    assert TOKENIZER.encode("").ids == []


def test_digits_stay_apart() -> None:
    assert TOKENIZER.encode("1812").tokens == ["1", "8", "1", "2"]


def test_training_is_deterministic() -> None:
    assert recipe.train_tokenizer(DOCUMENTS, VOCAB_SIZE).to_str() == TOKENIZER.to_str()


def test_transformers_reads_the_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = "<|user|>The Union of 1812\n<|assistant|> caf\u00e9"
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text).ids == Tokenizer.from_file(str(path)).encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_encode_file_frames_every_document(tmp_path: Path) -> None:
    text_path, token_path = tmp_path / "train.txt", tmp_path / "train.npy"
    text_path.write_text("".join(f"{text}\n{corpus.SEPARATOR}\n" for text in DOCUMENTS[:3]), encoding="ascii")
    tokens = recipe.encode_file(TOKENIZER, text_path, token_path)
    np.testing.assert_array_equal(np.load(token_path), tokens)
    assert tokens.dtype == np.uint16
    expected = [[0, *TOKENIZER.encode(text).ids, 1] for text in DOCUMENTS[:3]]
    assert tokens.tolist() == [token for document in expected for token in document]


@pytest.mark.parametrize("size", [259, 65537])
def test_vocabulary_must_hold_the_bytes_and_fit_uint16(size: int) -> None:
    with pytest.raises(ValueError, match=rf"train_tokenizer: want vocab_size in 260\.\.65536, got {size}"):
        recipe.train_tokenizer(DOCUMENTS, size)


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="want 4096 entries"):
        recipe.train_tokenizer(["short"])
