"""A headless Chromium, where one is installed, spoken to in the Chrome DevTools Protocol over a pipe."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on PATH")
# root has no sandbox, and no name of another machine is looked up: what a page has must be on this one
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost",
)


class Page:
    """One page; ``errors`` has what its scripts threw and nobody caught."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, os.fdopen(from_browser, "rb")
        self.number, self.session = 0, {}
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.from_browser.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def open(self, url: str, scheme: str = "light") -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """Of an expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression as soon as it is something."""
        deadline = time.monotonic() + seconds
        while not (value := self.value(script)):
            shown = "" if time.monotonic() < deadline else self.value("document.body.innerText")
            assert time.monotonic() < deadline, f"not there after {seconds} s: {script}; the page has {shown[:1000]!r}"
            time.sleep(0.2)
        return value


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser of its own, which keeps its files in ``folder``."""
    assert BROWSER is not None
    (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
    # where the protocol has its ends; sh knows no descriptors above 9
    shell = f'exec "$@" 3<&{read_there} 4>&{write_there}'
    command = ["bash", "-c", shell, "bash", BROWSER, *OPTIONS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, pass_fds=(read_there, write_there), stderr=subprocess.DEVNULL)
    os.close(read_there)
    os.close(write_there)
    page = None
    try:
        page = Page(write_here, read_here)
        yield page
    finally:
        process.terminate()
        process.wait()
        os.close(write_here)
        if page is not None:
            page.from_browser.close()
