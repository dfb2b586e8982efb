"""Two processes over Gloo, each with half of every matrix, against one with all of it."""

import json
from dataclasses import replace

import pytest
import torch

import tensor_parallel_worker
from deepfuse.blocks.axis import Axis
from deepfuse.blocks.cut import Cut, taken, whole_shape
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.tensor_parallel import to_tensor_parallel
from ranks import run_ranks
from tiny_checkpoint import TINY

TOLERANCE = 1e-5
"""Of float32: sums over up to 48 numbers in another order, 48 * 2 ** -24 = 3e-6 of their size, over a few layers."""
CASES = [*tensor_parallel_worker.MODELS, "through the passes"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    run_ranks(tensor_parallel_worker.__file__, 2, folder)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_logits_losses_and_every_gradient_are_one_process_s(said, name):
    for errors in (said[0][name], said[1][name]):
        assert {"logits", "next_token_loss", "model.embed_tokens.weight"} < errors.keys()
        assert {k: v for k, v in errors.items() if not v <= TOLERANCE} == {}


def test_fp8_of_whole_blocks_is_one_process_s(said):
    # an activation that differs in its last bit may be rounded to the next of 2 ** 3 steps an octave
    for words in said:
        assert words["in FP8"] <= 2**-4
        assert max(words["trained in FP8"].values()) <= 2**-3


def test_random_weights_are_parts_of_one_process_s(said):
    assert [words["drawn"] for words in said] == [True, True]


def test_cuts():
    x = torch.arange(24).view(2, 12)
    second = Axis("tensor", "0", 2, 1)
    cuts = [Cut(Axis("expert", "1", 2, 0), 0), Cut(second, 1, 2)]
    assert taken(x, cuts).tolist() == [[3, 4, 5, 9, 10, 11]]
    assert whole_shape((1, 6), cuts) == (2, 12)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "want num_attention_heads divisible by the 2 processes"),
        ({"vocab_size": 65}, "want vocab_size divisible by the 2 processes of axis 'tensor', got 65"),
        ({"intermediate_size": 47}, "want intermediate_size divisible"),
        ({"moe_intermediate_size": 23}, "want moe_intermediate_size divisible"),
        ({"attention": "mha"}, "want attention 'mla' to be dealt out over axis 'tensor', got 'mha'"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(change, text):
    with torch.device("meta"):
        model = CausalLM(replace(TINY, **change))
    with pytest.raises(ValueError, match=text):
        to_tensor_parallel(model, Axis("tensor", "0", 2, 0))
    assert model.cuts == {}


def test_a_model_in_fp8_is_refused():
    with torch.device("meta"):
        model = CausalLM(TINY)
        to_fp8(model)
    with pytest.raises(ValueError, match="want a model to be cut before its weights are FP8"):
        to_tensor_parallel(model, Axis("tensor", "0", 2, 0))
