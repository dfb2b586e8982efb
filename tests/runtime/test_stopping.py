"""Where a generation ends: at tokens and at strings, which are not part of it."""

import pytest
import torch

from deepfuse.runtime.generation_config import GenerationConfig
from prompts import ON, PROMPTS, TEXTS
from tiny_model import EOS


def test_stop_tokens_end_a_sequence_and_are_not_part_of_it(model):
    ids = model.generate(PROMPTS[0], max_new_tokens=20, **ON)
    stop = ids[8]
    cut = ids.index(stop)
    assert model.generate(PROMPTS[0], max_new_tokens=20, temperature=0.0, stop_token_ids=(stop,)) == ids[:cut]
    others = model.generate([PROMPTS[0], PROMPTS[3]], max_new_tokens=20, temperature=0.0, stop_token_ids=(stop, 1))
    assert others[0] == ids[:cut]


@pytest.mark.parametrize("eos", ["config", "generation_config"])
def test_end_of_text_tokens_come_from_the_checkpoint(model, monkeypatch, eos):
    logits = torch.zeros(1, model.config.vocab_size)
    logits[0, EOS if eos == "config" else 9] = 1
    monkeypatch.setattr(model.engine, "prefill", lambda *a, **k: logits)
    monkeypatch.setattr(model.engine, "decode", lambda *a, **k: logits)
    if eos == "generation_config":
        monkeypatch.setattr(model, "defaults", GenerationConfig(eos_token_id=(9, 10)))
    assert model.generate([7], max_new_tokens=5) == []
    assert model.generate([7], max_new_tokens=5, stop_token_ids=()) == [int(logits.argmax())] * 5


def test_stop_strings_end_a_text(model):
    whole = model.generate(TEXTS[0], max_new_tokens=40, **ON)
    assert len(whole) > 20
    # from the middle of one token to the middle of another
    for begin, length in ((7, 1), (9, 4), (3, 9)):
        stop = whole[begin : begin + length]
        expected = whole[: whole.index(stop)]
        assert model.generate(TEXTS[0], max_new_tokens=40, stop=[stop, "no such text"], **ON) == expected
        assert "".join(model.generate(TEXTS[0], max_new_tokens=40, stop=[stop], stream=True, **ON)) == expected


def test_a_stop_string_may_span_tokens(model):
    ids = model.generate(model.tokenizer.encode(TEXTS[1]), max_new_tokens=30, **ON)
    pieces = [model.tokenizer.decode([i]) for i in ids]
    at = next(i for i in range(2, 29) if "\ufffd" not in pieces[i] + pieces[i + 1] and pieces[i] and pieces[i + 1])
    stop = pieces[at][-1] + pieces[at + 1][0]
    whole = model.generate(TEXTS[1], max_new_tokens=30, **ON)
    assert model.generate(TEXTS[1], max_new_tokens=30, stop=stop, **ON) == whole[: whole.index(stop)]


def test_a_stop_string_ends_its_text_only(model):
    whole = model.generate(TEXTS, max_new_tokens=30, **ON)
    stop = whole[1][5:8]
    cut = model.generate(TEXTS, max_new_tokens=30, stop=[stop], **ON)
    assert cut == [text.partition(stop)[0] for text in whole] and cut[1] != whole[1]


def test_decoding_goes_no_further_than_the_stop_string(model, monkeypatch):
    whole = model.generate(TEXTS[0], max_new_tokens=40, **ON)
    steps = []
    decode = model.engine.decode
    monkeypatch.setattr(model.engine, "decode", lambda *a: steps.append(1) or decode(*a))
    model.generate(TEXTS[0], max_new_tokens=40, stop=[whole[4:6]], **ON)
    assert 0 < len(steps) < 20
