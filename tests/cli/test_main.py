"""Help, interrupts, errors and pipes, whatever the command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import run
from deepfuse.__main__ import COMMANDS


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, name, "--help")
        assert caught.value.code == 0


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "nothing")
    assert caught.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_an_interrupt_while_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepfuse.runtime.build.build", build)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "build", tmp_path)
    assert caught.value.code == 130 and capsys.readouterr().err == "deepfuse: interrupted\n"


def test_a_reader_that_has_read_enough() -> None:
    # one row of a longer output, as head reads it
    command = [sys.executable, "-m", "deepfuse", "ops", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 141 and "deepfuse:" not in said and "Broken" not in said


def test_a_traceback_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFUSE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="want an op out of"):
        run(monkeypatch, "ops", "nothing")
