"""Rows of a benchmark beside those of a baseline: faster, slower, or the same within the spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from deepfuse.profiling.bench_results import Figure, Results, words

Verdict = Literal["better", "worse", "same", "new", "not run"]


@dataclass(frozen=True, slots=True)
class Change:
    """One alternative of one row.

    Attributes:
        ratio: how many times better it is now: below 1 it is worse; ``None`` where there is nothing to compare.
        verdict: ``same`` where the middle halves of the rounds overlap: the machine's moods explain it.
    """

    row: str
    alternative: str
    unit: str
    before: Figure | None
    now: Figure | None
    ratio: float | None
    verdict: Verdict


def changes(baseline: Results, results: Results, measured: Sequence[str]) -> list[Change]:
    """Of each row that was measured now, and each of the baseline that was not."""
    out = []
    for row in results.rows:
        if row.name not in measured:
            continue
        old = baseline.row(row.name)
        for label, now in row.figures.items():
            before = old.figures.get(label) if old is not None and old.unit == row.unit else None
            if before is None:
                out.append(Change(row.name, label, row.unit, None, now, None, "new"))
                continue
            up = row.better == "higher"
            over, under = (now, before) if up else (before, now)
            ratio = over[0] / under[0] if under[0] else None
            overlap = now[1] <= before[2] and before[1] <= now[2]
            better = (now[0] > before[0]) == up
            verdict: Verdict = "same" if overlap else "better" if better else "worse"
            out.append(Change(row.name, label, row.unit, before, now, ratio, verdict))
    for row in baseline.rows:
        found = results.row(row.name) if row.name in measured else None
        for label, before in row.figures.items():
            if found is None or label not in found.figures:
                out.append(Change(row.name, label, row.unit, before, None, None, "not run"))
    return out


def comparison(baseline: Results, results: Results, measured: Sequence[str]) -> Table:
    """The same for people."""
    table = Table(
        "row", "alternative", "unit", "baseline", "now", "times better", "verdict", title=_title(baseline, results)
    )
    colors = {"better": "green", "worse": "red", "new": "cyan", "not run": "yellow"}
    for change in changes(baseline, results, measured):
        color = colors.get(change.verdict)
        table.add_row(
            change.row,
            change.alternative,
            change.unit,
            _cell(change.before),
            _cell(change.now),
            "" if change.ratio is None else f"{change.ratio:.2f}",
            f"[{color}]{change.verdict}[/]" if color else change.verdict,
        )
    return table


def _title(baseline: Results, results: Results) -> str:
    old = {name: version for name, version in baseline.versions.items() if results.versions.get(name) != version}
    return f"against a baseline of {words(old)}" if old else "against the baseline"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    median, low, high = figure
    return f"{median:g}" if low == high else f"{median:g} ({low:g} to {high:g})"
