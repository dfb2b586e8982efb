"""Tokens of a text by the checkpoint's tokenizer, or random ones; and what the command says before it builds."""

import numpy as np
import pytest

from deepfuse.__main__ import main
from deepfuse.profiling.training_tokens import training_tokens
from tiny_model import CONFIG, TEXT, checkpoint, tiny_model


def test_random_tokens_are_the_same_each_time_and_of_the_vocabulary():
    tokens = training_tokens(str(checkpoint()), None, at_least=19)
    assert np.array_equal(tokens, training_tokens(str(checkpoint()), None, at_least=19))
    assert tokens.min() >= 0 and CONFIG.vocab_size // 2 < tokens.max() < CONFIG.vocab_size
    assert len(training_tokens("v2-lite", None, at_least=200_000)) == 200_000


def test_tokens_of_a_text(tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT[0])
    wanted = tiny_model().tokenizer.encode(TEXT[0])
    assert training_tokens(str(checkpoint()), text, at_least=2).tolist() == wanted
    with pytest.raises(ValueError, match=f"want a text of at least 5000 tokens, got {len(wanted)} in "):
        training_tokens(str(checkpoint()), text, at_least=5000)
    with pytest.raises(ValueError, match="want a checkpoint with tokenizer.json for --text, got v2-lite"):
        training_tokens("v2-lite", text, at_least=2)
    with pytest.raises(FileNotFoundError):
        training_tokens(str(checkpoint()), tmp_path / "none", at_least=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "--prompt", "a"], "want no --shapes, --memory, --stacks or --prompt with --train"),
        (["--text", "file"], "want --train with --text, --batch-size and --seq-len, got --text alone"),
        (["--train", "--seq-len", "0"], "want seq_len >= 1, got 0"),
    ],
)
def test_what_the_command_refuses(monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["deepfuse", "profile", str(checkpoint()), *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
