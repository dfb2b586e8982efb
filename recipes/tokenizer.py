"""Train the byte-level BPE tokenizer of the small model and turn text files into token arrays.

Vocabulary of 4096: four special tokens (`SPECIAL_TOKENS`, ids 0-3), the 256 bytes, 3836 merges. Text is cut by the
GPT-2 pattern with every digit on its own, so numbers are spelled digit by digit and no merge crosses a word boundary.
Every byte is in the vocabulary: any UTF-8 text is encoded without an unknown token, and decoding its ids with
`skip_special_tokens=False` gives the same text back. There is no post-processor: the caller adds begin_of_text.

tokenizer.json is the format of the `tokenizers` library; transformers reads it too
(`PreTrainedTokenizerFast(tokenizer_file=...)`).

A token file is a one-dimensional uint16 array in .npy form: for every document 0 (begin_of_text), its ids,
1 (end_of_text); the documents follow each other without gaps.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deepfuse.recipes.corpus import read_documents

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>")
BEGIN_OF_TEXT, END_OF_TEXT, USER, ASSISTANT = range(4)


def train_tokenizer(documents: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A BPE tokenizer trained on the documents.

    Args:
        documents: Training text only: merges learned from held-out text would flatter every later measurement.
        vocab_size: Entries including the four special tokens and 256 bytes; at most 65536, so that ids fit uint16.

    Raises:
        ValueError: The size is out of range, or the text is too small to yield that many entries.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if not smallest <= vocab_size <= 65536:
        raise ValueError(f"train_tokenizer: want vocab_size in {smallest}..65536, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # sorted, because the library hands the alphabet out in the order of a hash set
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"train_tokenizer: want {vocab_size} entries, got {tokenizer.get_vocab_size()}; "
            "give more text or a smaller vocab_size"
        )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> npt.NDArray[np.uint16]:
    """All documents as one array: begin_of_text, ids, end_of_text, for each of them."""
    parts = []
    for encoding in tokenizer.encode_batch_fast(list(documents), add_special_tokens=False):
        parts.append(np.array([BEGIN_OF_TEXT, *encoding.ids, END_OF_TEXT], dtype=np.uint16))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


def encode_file(tokenizer: Tokenizer, text_path: Path, token_path: Path) -> npt.NDArray[np.uint16]:
    """Encode a file that `corpus.prepare` wrote, save the array as .npy and return it."""
    tokens = encode_documents(tokenizer, read_documents(text_path))
    np.save(token_path, tokens)
    return tokens


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tokenizer on train.txt and encode both text files.")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where train.txt and heldout.txt are")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args(argv)
    tokenizer = train_tokenizer(read_documents(args.folder / "train.txt"), args.vocab_size)
    tokenizer.save(str(args.folder / "tokenizer.json"))
    for split in ("train", "heldout"):
        text_path = args.folder / f"{split}.txt"
        tokens = encode_file(tokenizer, text_path, args.folder / f"{split}.npy")
        documents = read_documents(text_path)
        text_bytes = sum(map(len, documents))
        print(
            f"{split}: {len(documents)} documents, {text_bytes} bytes of text, {len(tokens)} tokens, "
            f"{text_bytes / len(tokens):.3f} bytes per token"
        )


if __name__ == "__main__":
    main()
