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


@pytest.mark.parametrize("prompts", [[tuple(IDS)], np.array([IDS]), torch.tensor([IDS])])
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
