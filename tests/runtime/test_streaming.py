"""Tokens and text as they come, while other calls run."""

import pytest
import torch

from prompts import ON, PROMPTS, TEXTS


def test_streamed_text_is_the_text(model):
    pieces = list(model.generate(TEXTS[0], max_new_tokens=25, stream=True, **ON))
    assert "".join(pieces) == model.generate(TEXTS[0], max_new_tokens=25, **ON)
    assert len(pieces) > 5 and all(pieces)


def test_streamed_ids_are_the_ids(model):
    assert list(model.generate(PROMPTS[2], max_new_tokens=9, stream=True, **ON)) == model.generate(
        PROMPTS[2], max_new_tokens=9, **ON
    )
    assert list(model.generate([PROMPTS[2]], max_new_tokens=2, stream=True, **ON)) == model.generate(
        PROMPTS[2], max_new_tokens=2, **ON
    )


def test_several_streams_come_with_their_numbers(model):
    texts = [""] * len(TEXTS)
    order = []
    for number, piece in model.generate(TEXTS, max_new_tokens=10, stream=True, **ON):
        texts[number] += piece
        order.append(number)
    assert texts == model.generate(TEXTS, max_new_tokens=10, **ON)
    assert order != sorted(order), "one after the other is no stream"


def test_a_piece_comes_before_the_next_step(model, monkeypatch):
    steps = []
    decode = model.engine.decode
    monkeypatch.setattr(model.engine, "decode", lambda *a: steps.append(1) or decode(*a))
    stream = model.generate(PROMPTS[0], max_new_tokens=5, stream=True, **ON)
    assert steps == []
    for i in range(3):
        next(stream)
        assert len(steps) == i
    del stream


def test_mistakes_are_told_before_the_first_piece(model):
    with pytest.raises(ValueError, match="want at least one token"):
        model.generate([[]], stream=True)


def test_an_abandoned_stream_gives_its_pages_back(model):
    free = model.engine.cache.free_pages
    for pieces_read in (0, 1, 3):
        stream = model.generate(PROMPTS, max_new_tokens=50, stream=True, **ON)
        for _ in range(pieces_read):
            next(stream)
        assert (model.engine.cache.free_pages < free) == (pieces_read > 0)
        stream.close()
        assert model.engine.cache.free_pages == free
    single = model.generate(PROMPTS[0], max_new_tokens=50, stream=True, **ON)
    next(single)
    del single
    assert model.engine.cache.free_pages == free


def test_two_streams_do_not_disturb_each_other(model):
    expected = [model.generate(p, max_new_tokens=70, **ON) for p in PROMPTS[:2]]
    first, second = (model.generate(p, max_new_tokens=70, stream=True, **ON) for p in PROMPTS[:2])
    got = [[], []]
    for i in range(70):
        got[0].append(next(first))
        if i % 3 == 0:
            got[1] += [next(second) for _ in range(2)]
    got[1] += list(second)
    assert list(first) == [] and got == expected


def test_other_calls_during_a_stream_do_not_disturb_it(model):
    expected = model.generate(PROMPTS[0], max_new_tokens=12, **ON)
    got = []
    for token in model.generate(PROMPTS[0], max_new_tokens=12, stream=True, **ON):
        got.append(token)
        model(torch.randint(2, 300, (3, 70)))
        model.score([PROMPTS[3]])
        model.generate(PROMPTS[1], max_new_tokens=2, **ON)
    assert got == expected
