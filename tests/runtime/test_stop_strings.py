"""Text that comes in tokens: cut at the earliest stop string, and nothing given out is taken back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfuse.runtime.stop_strings import TextStream

TEXTS = st.text("abc", max_size=24)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


class Pieces:
    """A tokenizer of given pieces: token ``i`` is piece ``i``, of which the last character waits for the next token."""

    def __init__(self, pieces: list[str], *, lag: bool = False):
        self.pieces, self.lag, self.held = pieces, lag, ""

    def stream(self) -> "Pieces":
        return self

    def push(self, token: int) -> str:
        text = self.held + self.pieces[token]
        keep = min(1, len(text)) if self.lag else 0
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def text_stream(pieces: list[str], stop: tuple[str, ...], *, lag: bool = False) -> TextStream:
    tokenizer: Any = Pieces(pieces, lag=lag)
    return TextStream(tokenizer, stop)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Before the stop string that begins first, of those that are complete first.

    A text is read character by character; the first end of a stop string ends it.
    """
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@given(pieces=st.lists(st.text("abc", max_size=3), max_size=12), stop=STOPS, lag=st.booleans())
def test_text_ends_before_a_stop_string_and_only_grows(pieces: list[str], stop: tuple[str, ...], lag: bool) -> None:
    stream = text_stream(pieces, stop, lag=lag)
    whole, seen, given_out = "".join(pieces), "", ""
    for i, piece in enumerate(pieces):
        given_out += stream.push(i)
        seen += piece
        # certain: whatever comes next, this is how the text begins
        assert whole.startswith(given_out)
        if stream.stopped:
            break
        assert not any(s in given_out for s in stop)
    given_out += stream.finish()
    assert not any(s in given_out for s in stop)
    assert stream.stopped == any(s in whole for s in stop)
    if stream.stopped:
        # one of the stop strings follows
        assert any(whole[len(given_out) :].startswith(s) for s in stop)
    else:
        assert given_out == whole


@given(text=TEXTS, stop=STOPS)
def test_character_by_character_the_first_complete_stop_string_counts(text: str, stop: tuple[str, ...]) -> None:
    stream = text_stream(list(text), stop)
    assert "".join(stream.push(i) for i in range(len(text))) + stream.finish() == cut(text, stop)


@given(text=TEXTS, stop=STOPS)
def test_in_one_piece_the_earliest_stop_string_counts(text: str, stop: tuple[str, ...]) -> None:
    stream = text_stream([text], stop)
    begins = [text.index(s) for s in stop if s in text]
    assert stream.push(0) + stream.finish() == text[: min(begins, default=None)]


@given(data=st.data(), text=TEXTS, stop=st.text("abc", min_size=1, max_size=4))
def test_one_stop_string_cuts_every_split_alike(data: st.DataObject, text: str, stop: str) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stream = text_stream(pieces, (stop,), lag=data.draw(st.booleans()))
    assert "".join(stream.push(i) for i in range(len(pieces))) + stream.finish() == text.partition(stop)[0]


def test_only_what_may_begin_a_stop_string_waits() -> None:
    stream = text_stream(["ab", "b", "a", "bx", "ab", "a"], ("aba",))
    assert [stream.push(i) for i in range(4)] == ["", "abb", "", "abx"]
    assert (stream.push(4), stream.push(5), stream.stopped) == ("", "", True)


def test_after_a_stop_string_nothing_comes() -> None:
    stream = text_stream(["one.two", "three"], (".",))
    assert [stream.push(0), stream.push(1), stream.finish()] == ["one", "", ""]


def test_an_unfinished_stop_string_is_given_at_the_end() -> None:
    stream = text_stream(["a", "b"], ("abc",))
    assert [stream.push(0), stream.push(1), stream.finish(), stream.finish()] == ["", "", "ab", ""]


def test_a_stop_string_that_the_end_completes() -> None:
    stream = text_stream(["xa", "b"], ("ab",), lag=True)
    assert [stream.push(0), stream.push(1), stream.finish()] == ["x", "", ""]
    assert stream.stopped


def test_a_stop_string_has_characters() -> None:
    with pytest.raises(ValueError, match="generate: want stop strings of at least one character, got an empty one"):
        text_stream([], ("a", ""))
