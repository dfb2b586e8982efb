"""A checkpoint with a tokenizer, and its model, for all commands."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deepfuse as df
from deepfuse.recipes.tokenizer import train_tokenizer
from deepfuse.runtime.save import save_checkpoint
from tiny_checkpoint import TINY, model_of

DOCUMENTS = [f"The {word} of the Union in 18{n}, and {word}s--once more.\n" for n, word in enumerate("abcdef" * 9)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=288, num_hidden_layers=2, num_nextn_predict_layers=0)
    save_checkpoint(model_of(config), path)
    train_tokenizer(DOCUMENTS, 285).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def built(folder: Path) -> df.Model:
    # not of the session: files between two of ours reset Dynamo, and its graphs would be made again, without their names
    return df.build(folder, device="cpu", max_batch_size=1, compile=False)


@pytest.fixture
def model(built: df.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[df.Model]:
    """The model of ``folder``, which the command line then has without building it again."""

    def build(source: str, **options: Any) -> df.Model:
        assert Path(source) == built.source and not options["compile"] and options["max_batch_size"] == 1
        return built

    monkeypatch.setattr("deepfuse.runtime.build.build", build)
    yield built
    assert built.engine.cache.free_pages == len(built.engine.cache.layers[0]) - 1
