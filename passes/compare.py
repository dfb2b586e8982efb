"""Two printed graphs side by side, where they differ."""

from difflib import SequenceMatcher

CONTEXT = 3
"""Equal lines shown around a difference."""


def side_by_side(before: str, after: str, width: int = 160) -> str:
    """Lines that differ beside each other, marked ``<`` (gone), ``>`` (new) or ``|`` (changed), with some around them."""
    left, right = before.splitlines(), after.splitlines()
    column = (width - 3) // 2
    rows: list[str] = []
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for group in matcher.get_grouped_opcodes(CONTEXT):
        if rows:
            rows.append("...")
        for tag, i1, i2, j1, j2 in group:
            mark = {"equal": " ", "delete": "<", "insert": ">", "replace": "|"}[tag]
            gone, new = left[i1:i2], right[j1:j2]
            for i in range(max(len(gone), len(new))):
                rows += _row(gone[i] if i < len(gone) else "", mark, new[i] if i < len(new) else "", column)
    return "\n".join(rows) if rows else "no difference"


def _row(left: str, mark: str, right: str, column: int) -> list[str]:
    """One line on each side, broken where it is longer than a column."""
    lefts, rights = _broken(left, column), _broken(right, column)
    count = max(len(lefts), len(rights))
    lefts += [""] * (count - len(lefts))
    rights += [""] * (count - len(rights))
    return [f"{a:<{column}} {mark} {b}".rstrip() for a, b in zip(lefts, rights, strict=True)]


def _broken(line: str, column: int) -> list[str]:
    text = line.strip().replace("torch.ops.", "")
    return [text[i : i + column] for i in range(0, len(text), column)] or [""]
