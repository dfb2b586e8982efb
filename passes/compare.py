"""Two printed graphs side by side, where they differ."""

from collections.abc import Iterator
from difflib import SequenceMatcher

CONTEXT = 3
"""Equal lines shown around a difference."""

Row = tuple[str, str, str]
"""A line of the graph before, a mark, and a line of the graph after."""


def changed_lines(before: str, after: str) -> Iterator[list[Row]]:
    """Groups of lines that differ, marked ``<`` (gone), ``>`` (new) or ``|`` (changed), with some around them."""
    left, right = before.splitlines(), after.splitlines()
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for group in matcher.get_grouped_opcodes(CONTEXT):
        rows: list[Row] = []
        for tag, i1, i2, j1, j2 in group:
            mark = {"equal": " ", "delete": "<", "insert": ">", "replace": "|"}[tag]
            gone, new = left[i1:i2], right[j1:j2]
            for i in range(max(len(gone), len(new))):
                lines = (of[i] if i < len(of) else "" for of in (gone, new))
                rows.append((_short(next(lines)), mark, _short(next(lines))))
        yield rows


def side_by_side(before: str, after: str, width: int = 160) -> str:
    """:func:`changed_lines` in two columns of text."""
    column = (width - 3) // 2
    rows: list[str] = []
    for group in changed_lines(before, after):
        if rows:
            rows.append("...")
        for left, mark, right in group:
            rows += _row(left, mark, right, column)
    return "\n".join(rows) if rows else "no difference"


def _row(left: str, mark: str, right: str, column: int) -> list[str]:
    """One line on each side, broken where it is longer than a column."""
    lefts, rights = _broken(left, column), _broken(right, column)
    count = max(len(lefts), len(rights))
    lefts += [""] * (count - len(lefts))
    rights += [""] * (count - len(rights))
    return [f"{a:<{column}} {mark} {b}".rstrip() for a, b in zip(lefts, rights, strict=True)]


def _short(line: str) -> str:
    return line.strip().replace("torch.ops.", "").replace("__import__('operator', fromlist=['']).", "")


def _broken(line: str, column: int) -> list[str]:
    return [line[i : i + column] for i in range(0, len(line), column)] or [""]
