"""generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig as Oracle

from deepfuse.runtime.checkpoint_files import CheckpointError
from deepfuse.runtime.generation_config import GenerationConfig


def written(folder: Path, content: dict[str, Any]) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return GenerationConfig.from_folder(folder)


def test_without_a_file_text_is_greedy(tmp_path: Path) -> None:
    config = GenerationConfig.from_folder(tmp_path)
    assert config == GenerationConfig()
    assert (config.temperature, config.top_k, config.top_p, config.eos_token_ids) == (0.0, 0, 1.0, ())


def test_the_file_of_deepseek_v3(tmp_path: Path) -> None:
    content = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True}
    config = written(tmp_path, content | {"temperature": 0.6, "top_p": 0.95, "transformers_version": "4.33.1"})
    assert (config.temperature, config.top_p, config.eos_token_ids) == (0.6, 0.95, (1,))
    assert config.extra == {"_from_model_config": True, "bos_token_id": 0, "transformers_version": "4.33.1"}


@pytest.mark.parametrize(
    ("content", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"do_sample": False, "temperature": 0.3}, 0.0),
        ({"temperature": 0.3}, 0.0),
        ({"do_sample": None, "temperature": None}, 0.0),
    ],
)
def test_it_samples_only_where_told_to(content: dict[str, Any], temperature: float, tmp_path: Path) -> None:
    assert written(tmp_path, content).temperature == temperature


def test_null_and_lists(tmp_path: Path) -> None:
    config = written(tmp_path, {"eos_token_id": [3, 5], "top_k": None, "max_new_tokens": 7})
    assert config.eos_token_ids == (3, 5) and config.top_k == 0 and config.max_new_tokens == 7


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_writes(tmp_path: Path) -> None:
    Oracle(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=33, eos_token_id=[1, 2]
    ).save_pretrained(tmp_path)
    config = GenerationConfig.from_folder(tmp_path)
    assert (config.temperature, config.top_k, config.top_p, config.max_new_tokens) == (0.7, 20, 0.9, 33)
    assert config.eos_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"do_sample": True, "temperature": "hot"}, "want temperature a number >= 0, got 'hot'"),
        ({"do_sample": True, "temperature": -1}, "want temperature a number >= 0, got -1"),
        ({"top_k": 1.5}, "want top_k an integer >= 0, got 1.5"),
        ({"top_p": 0}, r"want top_p a number in \(0, 1\], got 0"),
        ({"max_new_tokens": 0}, "want max_new_tokens an integer >= 1, got 0"),
        ({"eos_token_id": "x"}, "want eos_token_id a token id, a list of them or null, got 'x'"),
        ({"eos_token_id": [1, -1]}, r"want eos_token_id .* got \(1, -1\)"),
    ],
)
def test_values_out_of_range_are_refused(content: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: generation_config: {match}"):
        written(tmp_path, content)


def test_a_file_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("nothing")
    with pytest.raises(CheckpointError, match="generation_config.json: want a JSON file, got"):
        GenerationConfig.from_folder(tmp_path)
