"""What counts as a prompt, as a list of prompts, and as neither."""

from typing import Any

import numpy as np
import pytest
import torch

from tiny_model import tiny_model

IDS = [5, 6, 7]
NEW: dict[str, Any] = {"max_new_tokens": 3, "stop_token_ids": ()}


@pytest.mark.parametrize("prompt", [tuple(IDS), np.array(IDS), torch.tensor(IDS), list(np.array(IDS))])
def test_one_prompt_in_any_form_gives_one_answer(prompt: Any) -> None:
    assert tiny_model().generate(prompt, **NEW) == tiny_model().generate(IDS, **NEW)


@pytest.mark.parametrize(
    "prompts", [[tuple(IDS)], [np.array(IDS)], [torch.tensor(IDS)], np.array([IDS]), torch.tensor([IDS])]
)
def test_rows_are_prompts(prompts: Any) -> None:
    assert tiny_model().generate(prompts, **NEW) == [tiny_model().generate(IDS, **NEW)]


# a compiled graph would read the bits of floats as integers
@pytest.mark.parametrize(
    "prompts", [[5.0, 6.0], [[5.0, 6.0]], np.array([5.0, 6.0]), torch.ones(1, 3), [[5, None]], [None]]
)
def test_what_is_no_integer_is_no_token(prompts: Any) -> None:
    with pytest.raises(TypeError, match="model: want a prompt as a string or as integers, got "):
        tiny_model().generate(prompts, **NEW)


@pytest.mark.parametrize("text", ["the quick", IDS, torch.tensor(IDS)])
def test_one_text_is_no_list_to_score(text: Any) -> None:
    with pytest.raises(TypeError, match="score: want a list of texts, got a single one"):
        tiny_model().score(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 2.5}, TypeError, "want max_new_tokens as integral number, got 2.5"),
        ({"temperature": "hot"}, TypeError, "want temperature as real number, got 'hot'"),
        ({"temperature": 1e39}, ValueError, "want temperature in 0 .. 1e6"),
        ({"top_k": 10**20}, ValueError, "want top_k >= 0 and below"),
        ({"seed": None}, TypeError, "want seed as integral number, got None"),
        ({"seed": 2**63}, ValueError, "want a seed of at most 62 bits"),
        ({"stop": 7}, TypeError, "want stop as a string or a list of strings, got 7"),
        ({"stop": [7]}, TypeError, "want stop as a string or a list of strings"),
    ],
)
def test_options_of_the_wrong_kind(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"generate: {message}"):
        tiny_model().generate(IDS, **{**NEW, **options})
