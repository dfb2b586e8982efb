"""The folder of compile results: captured graphs, Inductor's code, and the reports that belong to them.

    <root>/torch-<version>/inductor/         Inductor's own cache
    <root>/torch-<version>/builds/<key>/     one captured graph a file, and report.json

Everything is written under a temporary name and renamed, so processes that build at once do not disturb each other; a
file that cannot be read is thrown away and made again. ``DEEPFUSE_CACHE_DIR`` sets the root (default
``~/.cache/deepfuse``).
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepfuse.ir.private import default_inductor_folder


def cache_root() -> Path:
    """The folder; it need not exist.

    Raises:
        RuntimeError: there is no home directory to have it in, and ``DEEPFUSE_CACHE_DIR`` names no other.
    """
    named = os.environ.get("DEEPFUSE_CACHE_DIR")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "deepfuse"
    except RuntimeError:
        raise RuntimeError("cache: want a home directory or DEEPFUSE_CACHE_DIR, got neither") from None


def _versioned() -> Path:
    return cache_root() / f"torch-{torch.__version__}"


def cache_size() -> tuple[int, int]:
    """Number of files and bytes of what we made."""
    sizes = []
    for path in cache_root().glob("torch-*/**/*"):
        with contextlib.suppress(FileNotFoundError):  # another process may be clearing
            if path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def clear_cache() -> None:
    """Delete what we made. The folder may be one of the user's that holds other things, and then stays."""
    for path in cache_root().glob("torch-*"):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        cache_root().rmdir()


@contextlib.contextmanager
def inductor_cache() -> Iterator[None]:
    """Inductor keeps its code in our folder while we compile, unless the user has chosen one."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before, ours = os.environ.get(name), _versioned() / "inductor"
    # torch sets the variable to its default when Dynamo is imported: that is nobody's choice
    chosen = before is not None and before != default_inductor_folder()
    if chosen or not _fit_for_inductor(ours):
        yield
        return
    os.environ[name] = str(ours)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _fit_for_inductor(folder: Path) -> bool:
    """Inductor fails where it cannot write, or with a space in a name, which parts its commands; its default is better then."""
    if any(c.isspace() for c in str(folder)):
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


class BuildFolder:
    """What is kept of one build."""

    def __init__(self, key: str):
        self.path = _versioned() / "builds" / key

    def graph_path(self, name: str) -> Path:
        return self.path / f"{name}.graph"

    def write(self, name: str, data: bytes) -> None:
        """Write atomically; a folder that cannot be written is no error, only no cache."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path)
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(data)
                os.replace(temporary, self.path / name)
            except OSError:
                os.unlink(temporary)

    def read_json(self, name: str) -> Any:
        """What was written under a name; ``None`` if there is nothing that can be read."""
        try:
            return json.loads((self.path / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, data: Any) -> None:
        self.write(f"{name}.json", json.dumps(data).encode())

    def read_report(self) -> dict[str, Any] | None:
        """The report of the build that filled the folder; ``None`` if there is none that can be read."""
        found: dict[str, Any] | None = self.read_json("report")
        return found

    def write_report(self, report: dict[str, Any]) -> None:
        self.write_json("report", report)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
