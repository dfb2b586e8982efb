"""A progress bar for work that turns out to be long: it appears after a second, and on a terminal only."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

DELAY = 1.0
"""Seconds; less would flicker, more would look as if nothing happened."""


class LoadingBar:
    """Counts bytes, on standard error."""

    def __init__(self, text: str, total_bytes: int, *, console: Console | None = None, delay: float = DELAY):
        self.text, self.total, self.delay, self.done = text, total_bytes, delay, 0
        self.console = console or Console(stderr=True)
        self._began = time.perf_counter()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self.done += count
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done)
        elif self.console.is_terminal and time.perf_counter() - self._began >= self.delay:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            text = TextColumn("{task.description}", markup=False)
            self._progress = Progress(text, *columns, console=self.console, transient=True)
            self._task = self._progress.add_task(self.text, total=self.total, completed=self.done)
            self._progress.start()
