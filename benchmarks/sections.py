"""Sections of a text that a script writes, between ``<!-- made by NAME -->`` and ``<!-- end of NAME -->``."""

import re


def section(text: str, name: str) -> str:
    """What stands in a section.

    Raises:
        ValueError: the text does not have it exactly once.
    """
    found = _find(text, name)
    return found["content"]


def with_section(text: str, name: str, content: str) -> str:
    """The text with other words in a section; errors as :func:`section`."""
    found = _find(text, name)
    return text[: found.start("content")] + content.strip("\n") + "\n" + text[found.end("content") :]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)) + "\n"


def _find(text: str, name: str) -> re.Match[str]:
    marked = rf"<!-- made by {re.escape(name)} -->\n(?P<content>.*?)<!-- end of {re.escape(name)} -->"
    found = list(re.finditer(marked, text, re.DOTALL))
    if len(found) != 1:
        raise ValueError(f"section: want {name!r} once, got it {len(found)} times")
    return found[0]
