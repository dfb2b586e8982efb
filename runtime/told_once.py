"""Errors that all processes raise alike, and one of each machine prints.

torchrun and shells show what every process writes; its first process (``LOCAL_RANK`` 0) speaks for the others, which end
with the same error and exit code, but without a traceback. Whoever catches the error sees no difference.

Only for what all have agreed to raise (:mod:`.verdict`): where one alone had it, nobody might print it.
"""

import builtins
import os
import sys
from types import TracebackType
from typing import TypeVar

MARK = "__deepfuse_told__"
EVERYWHERE = "__deepfuse_everywhere__"
E = TypeVar("E", bound=BaseException)


def told_once(error: E) -> E:
    """The error, which every process raises; nobody's ``except`` in the way, one of each machine prints it."""
    settled(error)
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
        setattr(error, MARK, True)
        if not isinstance(sys.excepthook, Unless):
            sys.excepthook = Unless(sys.excepthook)
    return error


def settled(error: E) -> E:
    """The error, of which no process is to be told any more."""
    setattr(error, EVERYWHERE, True)
    return error


def kind_of(error: BaseException) -> str:
    """Python's name of the nearest type that Python itself has."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")


def of_kind(kind: str, text: str) -> Exception:
    """The error of another process."""
    try:
        made: Exception = getattr(builtins, kind)(text)
    except TypeError:  # some are made of more, as UnicodeDecodeError
        return RuntimeError(text)
    return made


def everywhere(error: BaseException) -> bool:
    """Whether it is settled: every process raises it, or others cannot be told."""
    return hasattr(error, EVERYWHERE)


class Unless:
    """What prints an error that nobody caught, unless another process does."""

    def __init__(self, before: object):
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not hasattr(error, MARK):
            self.before(kind, error, trace)  # type: ignore[operator]
