"""Prompts that cannot be served, and what is said of them."""

import pytest
import torch

from deepfuse.runtime.generation import Sampling
from deepfuse.runtime.latent_cache import CacheFullError
from prompts import ON
from tiny_model import MAX_BATCH_SIZE, MAX_SEQ_LEN

TOO_LONG = [7] * (MAX_SEQ_LEN + 1)
REFUSED = {
    "empty prompt": (lambda m: m.generate([[5], []]), "want at least one token a prompt, got none in prompt 1"),
    "prompt too long": (
        lambda m: m.generate(TOO_LONG),
        rf"want at most max_seq_len = {MAX_SEQ_LEN} tokens, got {MAX_SEQ_LEN + 1} in prompt 0; build with a larger",
    ),
    "no room behind the prompt": (
        lambda m: m.generate(TOO_LONG[1:]),
        rf"want prompts shorter than max_seq_len = {MAX_SEQ_LEN} tokens, got {MAX_SEQ_LEN}; build",
    ),
    "past the cache": (
        lambda m: m.generate([[5], [6] * 250], max_new_tokens=7),
        rf"want prompt \+ max_new_tokens <= max_seq_len = {MAX_SEQ_LEN}, got 250 \+ 7; ask for at most 6, or build",
    ),
    "id too large": (lambda m: m.generate([5, 300]), r"want token ids in 0 \.\. 299, got 300 in prompt 0"),
    "negative id": (lambda m: m.generate([[5], [-1]]), r"want token ids in 0 \.\. 299, got -1 in prompt 1"),
    "no new tokens": (lambda m: m.generate([5], max_new_tokens=0), "want max_new_tokens >= 1, got 0"),
    "temperature": (lambda m: m.generate([5], temperature=-0.1), "want temperature in 0 .. 1e6, got -0.1"),
    "temperature nan": (lambda m: m.generate([5], temperature=float("nan")), "want temperature in 0 .. 1e6, got nan"),
    "top_k": (lambda m: m.generate([5], top_k=-1), "want top_k >= 0 and below .*, got -1"),
    "top_p 0": (lambda m: m.generate([5], top_p=0.0), r"want 0 < top_p <= 1, got 0\.0"),
    "top_p 2": (lambda m: m.generate([5], top_p=2.0), r"want 0 < top_p <= 1, got 2\.0"),
    "stop strings of ids": (
        lambda m: m.generate([5], stop=["a"]),
        "want string prompts with stop strings, got token ids",
    ),
    "empty stop string": (lambda m: m.generate("a", stop=[""]), "want stop strings of at least one character"),
    "score too long": (lambda m: m.score([TOO_LONG]), f"want at most max_seq_len = {MAX_SEQ_LEN} tokens"),
    "score nothing": (lambda m: m.score([[]]), "want at least one token a prompt"),
    "logits too long": (lambda m: m(torch.tensor([TOO_LONG])), f"want at most max_seq_len = {MAX_SEQ_LEN} tokens"),
    "logits of nothing": (lambda m: m(torch.zeros(2, 0, dtype=torch.int64)), "want at least one token a prompt"),
    "logits of padding": (
        lambda m: m(torch.tensor([[5]]), torch.tensor([[0]])),
        "want at least one token a prompt, got none in prompt 0",
    ),
    "logits of an id too large": (lambda m: m(torch.tensor([[300]])), r"want token ids in 0 \.\. 299, got 300"),
    "one dimension": (lambda m: m(torch.tensor([5, 6])), r"want input_ids \[B, T\] of integers, got \[2\] torch.int64"),
    "floats": (lambda m: m(torch.ones(1, 2)), r"want input_ids \[B, T\] of integers, got \[1, 2\] torch.float32"),
    "mask of another shape": (
        lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 2)),
        r"want attention_mask \[1, 3\], got \[1, 2\]",
    ),
    "padding between tokens": (
        lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]])),
        "want padding on one side of each sequence, got padding between tokens or on both",
    ),
    "padding on both sides": (
        lambda m: m(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 1, 0]])),
        "want padding on one side of each sequence, got padding between tokens or on both",
    ),
    "no chat template": (
        lambda m: m.chat([{"role": "user", "content": "hello"}]),
        "chat: want a model with a chat template .* got one without; use generate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(model, name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(model)


def test_strings_and_ids_do_not_mix(model):
    with pytest.raises(TypeError, match="want prompts all strings or all token ids, got both"):
        model.generate(["text", [5]])


def test_a_model_without_a_tokenizer_takes_ids_only(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    assert len(model.generate([5], max_new_tokens=2, **ON)) == 2
    for call in (lambda: model.generate("text"), lambda: model.score(["text"]), lambda: model.chat([])):
        with pytest.raises(
            ValueError, match=r"want a tokenizer .* got a model without tokenizer\.json; pass token ids"
        ):
            call()


def test_running_streams_may_fill_the_cache(model):
    streams = [
        model.generate([[5]], max_new_tokens=MAX_SEQ_LEN - 1, stream=True, **ON) for _ in range(MAX_BATCH_SIZE + 1)
    ]
    for stream in streams[:-1]:
        next(stream)
    with pytest.raises(CacheFullError, match="want 4 pages of 64 tokens, 0 are free; finish running generations first"):
        next(streams[-1])
    for stream in streams:
        stream.close()
    assert len(model.generate([5], max_new_tokens=3, **ON)) == 3


def test_sampling_is_checked_where_it_is_made():
    assert Sampling().max_new_tokens is None
    with pytest.raises(ValueError, match="want max_new_tokens >= 1"):
        Sampling(max_new_tokens=-1)
