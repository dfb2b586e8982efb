"""A headless Chromium, where one is installed."""

import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on PATH")


def dom(url: str, seconds: int = 10, scheme: str = "light") -> str:
    """The page as it stands after its scripts have run, and had time to load what they ask for.

    An error of a script, which the browser writes to its log, fails the test.
    """
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--virtual-time-budget={seconds}000",
    ]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=180, check=True)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Error" in line]
    assert not errors, errors
    return done.stdout
