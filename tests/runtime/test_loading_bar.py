"""The progress bar of long loads."""

import io

from rich.console import Console

from deepfuse.runtime.loading_bar import LoadingBar


def test_a_bar_appears_on_a_terminal_when_loading_is_long() -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with LoadingBar("loading [x] {y}", 100, console=console, delay=0) as bar:
            bar.advance(40)
            bar.advance(60)
        shown[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loading [x] {y}" in shown[True] and shown[False] == ""
    console = Console(file=io.StringIO(), force_terminal=True)
    with LoadingBar("quick", 100, console=console, delay=60) as bar:
        bar.advance(100)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
