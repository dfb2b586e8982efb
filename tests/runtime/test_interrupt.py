"""An interrupt loses nothing that was generated, and neither it nor an error keeps pages."""

from typing import Any

import pytest

from prompts import ON, PROMPTS, TEXTS
from tiny_model import tiny_model


@pytest.mark.parametrize("stream", [False, True])
def test_text_held_back_for_a_stop_string_is_given_out(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pieces = tiny_model(), []
    decode, options = model.engine.decode, {"max_new_tokens": 12, "stop_token_ids": ()}
    whole = model.generate("the quick", **options)

    def interrupted(*args: Any) -> Any:
        interrupted.steps += 1
        if interrupted.steps == 8:
            raise KeyboardInterrupt
        return decode(*args)

    interrupted.steps = 0
    monkeypatch.setattr(model.engine, "decode", interrupted)
    # all of the text may be the beginning of this stop string
    text = model.generate("the quick", stop=whole + "!", stream=stream, **options)
    if stream:
        with pytest.raises(KeyboardInterrupt):
            pieces.extend(text)
        text = "".join(pieces)
    assert text and whole.startswith(text) and text != whole


@pytest.mark.parametrize("during", ["prefill", "decode"])
def test_an_interrupt_returns_what_there_is(model, monkeypatch, during):
    expected = model.generate(PROMPTS[:2], max_new_tokens=20, **ON)
    calls = []
    original = getattr(model.engine, during)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if during == "prefill" or len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(model.engine, during, interrupted)
    got = model.generate(PROMPTS[:2], max_new_tokens=20, **ON)
    tokens = 0 if during == "prefill" else 4
    assert got == [ids[:tokens] for ids in expected]
    assert model.generate(PROMPTS[0], max_new_tokens=1, **ON) == ([] if during == "prefill" else expected[0][:1])


def test_an_interrupted_stream_gives_its_pages_back(model, monkeypatch):
    stream = model.generate(TEXTS[0], max_new_tokens=20, stream=True, **ON)
    next(stream)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.engine, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)


def test_another_error_gives_the_pages_back(model, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.engine, "prefill", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(PROMPTS, max_new_tokens=3)
