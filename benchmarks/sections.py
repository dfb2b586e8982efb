"""Sections of a text that a script writes, between ``<!-- made by NAME -->`` and ``<!-- end of NAME -->``."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def computed_or_kept(about: str | None, results: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a script computes, and writes down as JSON; with ``--keep`` what it wrote down before."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="do not compute, but render the results there are")
    found = json.loads(results.read_text()) if parser.parse_args().keep else compute()
    results.write_text(json.dumps(found, indent=1) + "\n")
    return found


def write_sections(path: Path, contents: dict[str, str]) -> None:
    """Replace sections of a text by name."""
    text = path.read_text()
    for name, content in contents.items():
        text = with_section(text, name, content)
    path.write_text(text)


def _find(text: str, name: str) -> re.Match[str]:
    marked = rf"<!-- made by {re.escape(name)} -->\n(?P<content>.*?)<!-- end of {re.escape(name)} -->"
    found = list(re.finditer(marked, text, re.DOTALL))
    if len(found) != 1:
        raise ValueError(f"section: want {name!r} once, got it {len(found)} times")
    return found[0]
