"""TensorBoard on a run's directory, or on one that has several."""

import re
import signal
import subprocess
import sys
from pathlib import Path

from deepfuse.profiling.tensorboard_log import check_installed

ENDS_S = 5.0
"""Seconds that TensorBoard has for its end: its plugin may be reading a trace, which nobody waits for."""
_URL = re.compile(r"^TensorBoard \S+ at (http\S+)", re.MULTILINE)


def check_tensorboard() -> None:
    """Whether TensorBoard can show a run, for who builds a model first.

    Raises:
        RuntimeError: it or its plugin is not here.
    """
    check_installed("tensorboard", "torch_tb_profiler")


def serve(folder: Path) -> None:
    """Start TensorBoard, print where it is, and stay until Ctrl-C, or a kill, which both end it. In the main thread.

    Args:
        folder: that a profile wrote, or one above several of these.

    Raises:
        RuntimeError: it or its plugin is not here, or it does not start.
        ValueError: there is no run in ``folder``.
    """
    check_tensorboard()
    if not any(folder.rglob("run.json")):
        raise ValueError(f"profile open: want a directory with a run that profile wrote, got {folder}")
    # in a process of its own, since the plugin forks, and this one has threads
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said, url = "", None
    # the default would leave TensorBoard behind
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for line in process.stdout:
            found = _URL.search(line)
            if found:
                url = found[1]
                print(f"TensorBoard: {url} (Ctrl-C ends it)", flush=True)
            said += line if url is None else ""
        if url is None:
            raise RuntimeError(f"profile open: want TensorBoard to start, got {said.strip()[-500:]!r}")
    except KeyboardInterrupt:
        print()
    finally:
        _end(process)
        process.stdout.close()
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(ENDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
