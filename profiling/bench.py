"""What a suite of benchmarks is given: the device, timing, rows that are kept at once, and a budget.

A suite is one file ``benchmarks/<suite>.py``. The first line of its docstring is the question that it answers; then

    DEVICE = "cpu"                 # what it measures: "cpu" (the default), "cuda", or "auto": a GPU where there is one
    BUDGET = None                  # seconds after which it leaves out the rest, where --budget says nothing else

    def suite(bench: Bench) -> None:
        if bench.wants("decode", seconds=60):
            bench.interleaved("decode, context 64", {"deepfuse": ours, "transformers": theirs}, calls=8)

    if __name__ == "__main__":
        run_script(__file__)       # python benchmarks/<suite>.py, where the command line's packages are missing

Each part of a suite asks :meth:`Bench.wants` first, the most valuable part first, and makes its models only then: what
the budget has no room for is listed, what ``--only`` does not name costs nothing. Alternatives of a row run in turn in
one process (:meth:`Bench.interleaved`); other figures go into :meth:`Bench.row`. A row is written as it is measured, so
that a run that is cut keeps what it has. A peer that is not installed is :meth:`Bench.leave_out`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape

from deepfuse.profiling.bench_results import Figure, Results, Row
from deepfuse.profiling.timing import Timing, interleaved

SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6}
"""Units of time, a second."""
CUT = "the run was cut"
"""Why not all of a part was measured, until it comes to its end."""
DIGITS = 6
"""Of a figure: beyond them it is noise."""


class Bench:
    """One run of a suite.

    Args:
        results: with suite, device and versions; rows that it has stay, but for those that are measured anew.
        path: JSON to write after each row, if any.
        budget: seconds from now on, if bounded.
        only: run the parts whose name contains it.
        console: where each row is printed as it comes.
    """

    def __init__(
        self,
        results: Results,
        *,
        path: Path | None = None,
        budget: float | None = None,
        only: str | None = None,
        console: Console | None = None,
    ):
        self.results = results
        self.measured: list[str] = []
        """Names of the rows of this run."""
        self.parts: list[str] = []
        """All that were asked for."""
        self._path, self._budget, self._only = path, budget, only
        self._console = console or Console(quiet=True)
        self._began = time.monotonic()
        self._part = ""
        self._running = False
        self._ended: set[str] = set()

    @property
    def device(self) -> Mapping[str, Any]:
        """Facts of what is measured: ``kind`` (cpu or cuda), ``name``, ..."""
        return self.results.device

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device["kind"])

    @property
    def seconds_left(self) -> float:
        """Of the budget; infinite without one."""
        return float("inf") if self._budget is None else self._budget - (time.monotonic() - self._began)

    def wants(self, part: str, seconds: float) -> bool:
        """Whether a part of the suite is to be run; rows that follow belong to it.

        Args:
            part: its name, as ``--only`` has it.
            seconds: what it takes, generously: where less is left of the budget, it is listed as left out.
        """
        self._end_part()
        self.parts.append(part)
        self._part = part
        if self._only is not None and self._only not in part:
            return False
        self.results = self.results.without_left_out(part)
        left = self.seconds_left
        if left < seconds:
            self.leave_out(part, f"takes some {seconds:.0f} s, of the budget {max(left, 0):.0f} s are left")
            return False
        self._running = True
        return True

    def leave_out(self, name: str, why: str) -> None:
        """Say that something was not measured, on the screen and in the JSON."""
        self.results = self.results.with_left_out(name, why)
        self._console.print(f"[yellow]left out[/] {escape(name)}: {escape(why)}", soft_wrap=True)
        self._write()

    def interleaved(
        self,
        name: str,
        alternatives: Mapping[str, Callable[[], object]],
        *,
        unit: str = "ms",
        calls: int = 1,
        rounds: int = 7,
        warmup: int = 2,
        **facts: Any,
    ) -> dict[str, Timing]:
        """Time alternatives in turn (:func:`deepfuse.profiling.timing.interleaved`), and keep the row.

        Args:
            calls: of what is counted, that one call of an alternative makes: its time is divided by them.
            facts: of the row, beside the times.
        """
        timings = interleaved(alternatives, rounds=rounds, warmup=warmup)
        self.row(name, timings, unit=unit, calls=calls, **facts)
        return timings

    def row(
        self,
        name: str,
        figures: Mapping[str, Timing | float],
        *,
        unit: str = "ms",
        better: Literal["lower", "higher"] = "lower",
        calls: int = 1,
        **facts: Any,
    ) -> None:
        """Keep a row.

        Args:
            figures: times in seconds, which come into the unit and are divided by ``calls``; or numbers, kept as they
                are. The first is the one that is compared with the others.

        Raises:
            ValueError: no figures, a time in a unit that is none, or a second row of that name in one run.
        """
        if not figures:
            raise ValueError(f"bench: want figures of {name!r}, got none")
        if name in self.measured:
            raise ValueError(f"bench: want each row once, got {name!r} again")
        row = Row(
            name=name,
            part=self._part,
            unit=unit,
            better=better,
            figures={label: _figure(value, unit, calls) for label, value in figures.items()},
            facts=facts,
            date=datetime.now(UTC).date().isoformat(),
            command=self._command(),
        )
        self.measured.append(name)
        self.results = self.results.with_row(row)
        self._console.print(_line(row), soft_wrap=True)
        self._write()

    def finish(self) -> None:
        """The suite came to its end. It is finished where each of its parts was, now or in the run whose rows it keeps."""
        self._end_part()
        left_out = {name for name, why in self.results.left_out.items() if why != CUT}
        before = {row.part for row in self.results.rows} - self.results.left_out.keys()
        self.results = replace(self.results, finished=self._ended | before | left_out >= set(self.parts))
        self._write()

    def _end_part(self) -> None:
        if self._running:
            self._ended.add(self._part)
        self._running = False

    def _command(self) -> str:
        only = f' --only "{self._part}"' if self._part else ""
        return f"deepfuse bench {self.results.suite}{only}"

    def _write(self) -> None:
        if self._path is None:
            return
        cut = self._running and self._part not in self.results.left_out
        (self.results.with_left_out(self._part, CUT) if cut else self.results).write(self._path)


def _figure(value: Timing | float, unit: str, calls: int) -> Figure:
    if not isinstance(value, Timing):
        return (_rounded(value),) * 3
    if unit not in SCALES:
        raise ValueError(f"bench: want a time in {', '.join(SCALES)}, got {unit!r}")
    scale = SCALES[unit] / calls
    return _rounded(value.median * scale), _rounded(value.low * scale), _rounded(value.high * scale)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _line(row: Row) -> str:
    (first, (ours, _, _)), *others = row.figures.items()
    parts = [f"{escape(first)} {ours:g} {row.unit}"]
    for label, (median, _, _) in others:
        ratio = median / ours if ours else float("inf")
        parts.append(f"{escape(label)} {median:g} ({ratio:.2f}x)")
    return f"[bold]{escape(row.name)}[/]: " + ", ".join(parts)
