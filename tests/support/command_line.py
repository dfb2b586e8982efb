"""The command line, run in this process."""

import io
import sys
from pathlib import Path

import pytest

from deepfuse.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, stdin: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["deepfuse", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    monkeypatch.setenv("COLUMNS", "200")
    main()


def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is printed as the command fails: one line."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments, stdin="Hello\n")
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("deepfuse: ")
    return lines[0]
