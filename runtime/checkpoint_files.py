"""What all readers and writers of a checkpoint folder share: its error, JSON objects, and files replaced whole.

A file is written under a temporary name beside its place and renamed there, so that a kill or a full disk leaves the
file of before, or none, but never half a file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used as it is; the text names the file."""


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path.

    Raises:
        FileNotFoundError: nothing is there.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: want a folder, got {str(path)!r}, which does not exist")
    if not path.is_dir():
        raise NotADirectoryError(f"checkpoint: want a folder, got the file {str(path)!r}")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or unreadable, is not JSON, or holds another value than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: want a {path.name}, got none") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: want a JSON file, got {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: want a JSON object, got a {type(value).__name__}")
    return value


def object_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object as the files of a checkpoint have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is renamed to ``path``; no reader takes it for part of a checkpoint."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def durable(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = temporary_name(path)
    try:
        with durable(temporary) as file:
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
