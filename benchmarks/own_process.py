"""Code run in a process of its own, which finds modules where this one does, and what it costs as a whole."""

import json
import os
import subprocess
import sys
import time
from typing import Any

PROCESS = "whole process"
HEAD = "import json, sys\nsys.path[:0] = json.loads(sys.argv.pop(1))\n"


def run_code(code: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What the code prints last, a JSON object, and the seconds of the process as ``whole process``.

    ``sys.argv[1:]`` are the arguments; ``json`` and ``sys`` are imported.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-c", HEAD + code, json.dumps(sys.path), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"a process of the benchmark failed: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), PROCESS: seconds}
