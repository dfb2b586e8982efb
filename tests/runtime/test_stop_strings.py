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
    """Read one character at a time, up to the first end of a stop string: what stands before the longest that ends there."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@given(pieces=st.lists(st.text("abc", max_size=3), max_size=12), stop=STOPS, lag=st.booleans())
def test_text_is_cut_alike_however_it_is_split(pieces: list[str], stop: tuple[str, ...], lag: bool) -> None:
    stream = text_stream(pieces, stop, lag=lag)
    wanted, got = cut("".join(pieces), stop), ""
    for i in range(len(pieces)):
        got += stream.push(i)
        # certain: nothing of it is taken back
        assert wanted.startswith(got)
        if stream.stopped:
            break
    assert got + stream.finish() == wanted
    assert stream.stopped == any(s in "".join(pieces) for s in stop)


@given(text=TEXTS, stop=st.text("abc", min_size=1, max_size=4))
def test_one_stop_string_cuts_where_it_begins_first(text: str, stop: str) -> None:
    stream = text_stream([text], (stop,))
    assert stream.push(0) + stream.finish() == text.partition(stop)[0]


def test_the_stop_string_that_is_complete_first_counts() -> None:
    for pieces in (["xabc"], ["xa", "bc"], list("xabc")):
        stream = text_stream(pieces, ("abc", "b"))
        assert "".join(stream.push(i) for i in range(len(pieces))) + stream.finish() == "xa"


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
