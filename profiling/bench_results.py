"""What a benchmark found, as JSON: suite, device, versions, rows, and what was left out; compared in bench_against.py."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

Figure = tuple[float, float, float]
"""Median, first and last quartile; three times the same where nothing spreads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: the same thing, done by each of its alternatives.

    Attributes:
        name: says what was done; a suite has it once.
        part: of the suite, which ``--only`` runs alone.
        unit: of the figures: ``s``, ``ms``, ``us``, ``GB/s``, ``bits per byte``, ...
        better: which way they improve.
        figures: by alternative; the first is the one that the others are compared with.
        facts: what else is known: shapes, shares of a bound, ... as JSON has it.
        date: of the run that measured it (UTC).
        command: that measures it again.
    """

    name: str
    part: str
    unit: str
    better: Literal["lower", "higher"] = "lower"
    figures: Mapping[str, Figure]
    facts: Mapping[str, Any] = field(default_factory=dict)
    date: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A run of a suite.

    Attributes:
        device: what makes figures comparable: kind, name, and what else :func:`bench_device.facts` lists.
        versions: of what the figures depend on, by name.
        left_out: name of what was not run -> why.
        finished: every part came to its end, or is left out; otherwise the run was cut, or only parts were asked for.
    """

    suite: str
    command: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: tuple[Row, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    finished: bool = False

    def row(self, name: str) -> Row | None:
        """The row of a name, if it was measured."""
        return next((row for row in self.rows if row.name == name), None)

    def with_row(self, row: Row) -> "Results":
        """The same with one row more, in the place of one of its name if there is one."""
        kept = self.without_left_out(row.name)
        if self.row(row.name) is None:
            return replace(kept, rows=(*self.rows, row))
        return replace(kept, rows=tuple(row if old.name == row.name else old for old in self.rows))

    def with_left_out(self, name: str, why: str) -> "Results":
        """The same, with one more thing that was not run."""
        return replace(self, left_out={**self.left_out, name: why})

    def without_left_out(self, name: str) -> "Results":
        return replace(self, left_out={key: why for key, why in self.left_out.items() if key != name})

    def write(self, path: Path) -> None:
        """Write all, so that whoever reads meanwhile, or after a crash, has the old text or the new one."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text)
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What was written.

        Raises:
            ValueError: the file cannot be read, or was not written by ``deepfuse bench --json``.
        """
        try:
            content = json.loads(path.read_text())
            rows = tuple(_row(entry) for entry in content["rows"])
            if set(content) != {each.name for each in fields(cls)}:
                raise KeyError
            if not all(isinstance(content[name], dict) for name in ("device", "versions", "left_out")):
                raise TypeError
            return cls(**{**content, "rows": rows})
        except OSError as error:
            raise ValueError(
                f"bench: want a file that deepfuse bench --json wrote, got {path} ({error.strerror})"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"bench: want a file that deepfuse bench --json wrote, got {path}") from None


def words(entries: Mapping[str, Any]) -> str:
    """Device or versions in a line."""
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def check_comparable(ours: Mapping[str, Any], path: Path, theirs: Results, suite: str) -> None:
    """Figures of two files may stand beside each other.

    Raises:
        ValueError: they come from another suite or from another device.
    """
    if theirs.suite != suite:
        raise ValueError(f"bench: want results of {suite}, got {theirs.suite} in {path}")
    if dict(theirs.device) != dict(ours):
        raise ValueError(f"bench: want results of this device ({words(ours)}), got {words(theirs.device)} in {path}")


def _row(entry: dict[str, Any]) -> Row:
    figures = {}
    for name, (median, low, high) in entry["figures"].items():
        figures[name] = (float(median), float(low), float(high))
    return Row(**{**entry, "figures": figures})
