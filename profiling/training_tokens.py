"""Tokens to profile training on: of a text, or drawn at random.

Random ones are spread over all experts evenly, as a model that was not trained yet spreads those of a text; of a text, a
trained model's experts have loads that differ.
"""

from pathlib import Path

import numpy as np

from deepfuse.runtime.source import folder_and_config
from deepfuse.runtime.tokenizer import Tokenizer

RANDOM_TOKENS = 100_000


def training_tokens(model: str, text: Path | None, *, at_least: int) -> np.ndarray:
    """``[N]`` int64: those of the file ``text`` by the checkpoint's tokenizer; random ones where it is ``None``.

    Args:
        model: checkpoint directory or preset.
        at_least: tokens that a window needs.

    Raises:
        ValueError: there is no tokenizer, or the text is too short.
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    folder, config = folder_and_config(model)
    if text is None:
        return np.random.default_rng(0).integers(config.vocab_size, size=max(RANDOM_TOKENS, at_least))
    if folder is None or not (folder / "tokenizer.json").exists():
        raise ValueError(f"profile: want a checkpoint with tokenizer.json for --text, got {model}")
    tokens = np.array(Tokenizer.from_folder(folder).encode(text.read_text(encoding="utf-8")), dtype=np.int64)
    if len(tokens) < at_least:
        raise ValueError(f"profile: want a text of at least {at_least} tokens, got {len(tokens)} in {text}")
    return tokens
