"""Errors that all processes raise alike, and one of each machine prints.

torchrun and shells show what every process writes; its first process (``LOCAL_RANK`` 0) speaks for the others, which end
with the same error and exit code, but without a traceback. Whoever catches the error sees no difference.
"""

import os
import sys
from types import TracebackType

MARK = "__deepfuse_told__"


def told_once(error: Exception) -> Exception:
    """The error, which every process raises; nobody's ``except`` in the way, one of each machine prints it."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
        setattr(error, MARK, True)
        if not isinstance(sys.excepthook, Unless):
            sys.excepthook = Unless(sys.excepthook)
    return error


class Unless:
    """What prints an error that nobody caught, unless another process does."""

    def __init__(self, before: object):
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not hasattr(error, MARK):
            self.before(kind, error, trace)  # type: ignore[operator]
