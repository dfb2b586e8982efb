"""An interrupt loses nothing that was generated."""

from typing import Any

import pytest

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
