"""What a function calls: how the code behind a compiled graph is found, whatever stands between."""

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


def called_frames(fn: Callable[[], Any], look: Callable[[types.FrameType], Found | None]) -> tuple[list[Found], Any]:
    """What ``look`` makes of each call of Python code in this thread, but for ``None``; and what ``fn`` returns."""
    found: list[Found] = []

    def called(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and (seen := look(frame)) is not None:
            found.append(seen)

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        result = fn()
    finally:
        sys.setprofile(before)
    return found, result
