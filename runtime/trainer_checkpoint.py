"""What a trainer keeps to go on from: weights, moments and step, whole or not at all.

    trainer.safetensors                            of one process
    trainer.json, step-N/part-00000.safetensors    of several: each writes its part

The parts are written into a folder of their own; when all are there, ``trainer.json`` is replaced by one that names it.
So a kill, of one process or of all, leaves the checkpoint of before. Several processes see one file system, and go on over
the mesh they were saved over.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepfuse.runtime.agreement import agree
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.checkpoint_files import object_bytes, read_object, replace_file
from deepfuse.runtime.processes import Processes

SINGLE, INDEX = "trainer.safetensors", "trainer.json"


def write_state(
    folder: Path, state: Callable[[], dict[str, Tensor]], step: int, training: Any, processes: Processes
) -> None:
    """Write a checkpoint; all processes call it at the same time.

    Raises:
        OSError: from all of them, where one cannot write its part; the checkpoint of before stays.
    """
    settings = {k: str(v) for k, v in asdict(training).items()}
    facts = {"step": str(step), "training": json.dumps(settings)}
    axes = processes.axes
    if axes.size == 1:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / SINGLE, state(), facts)
        return
    unfinished = folder / f".step-{step}.tmp"
    with processes.raising_together("save"):
        if axes.rank == 0:
            for left in folder.glob(".step-*.tmp"):  # by a kill
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)
    with processes.raising_together("save"):
        if not unfinished.is_dir():
            raise FileNotFoundError(
                f"trainer: want one file system for all processes, got {unfinished}, which rank 0 has made, not seen by "
                f"rank {axes.rank}; train in a folder that all of them share"
            )
        _write(unfinished / _part(axes.rank), state(), facts)
    with processes.raising_together("save"):
        if axes.rank == 0:
            before = _index(folder)
            named = next(n for n in _names(step) if not (folder / n).exists())
            unfinished.rename(folder / named)
            replace_file(folder / INDEX, object_bytes({"step": step, "folder": named, "mesh": axes.sizes}))
            if before is not None:
                shutil.rmtree(folder / before["folder"], ignore_errors=True)


def read_state(folder: Path, processes: Processes) -> tuple[int, dict[str, Tensor]] | None:
    """Step and tensors of a checkpoint, of this process's part; ``None`` where there is none. All processes ask together.

    Raises:
        ValueError: it was saved over other processes, or they see different ones.
        SafetensorError: from all of them, where a part is damaged.
    """
    with processes.raising_together("load"):
        found = _read(folder, processes.axes)
    agree({"step of the checkpoint": "none" if found is None else str(found[0])}, processes.timeout_s)
    return found


def _read(folder: Path, axes: Axes) -> tuple[int, dict[str, Tensor]] | None:
    index = _index(folder)
    path = folder / SINGLE if index is None else folder / index["folder"] / _part(axes.rank)
    saved = {} if index is None else index["mesh"]
    if index is None and not path.exists():
        return None
    if saved != axes.sizes:
        raise ValueError(
            f"trainer: want the processes that {folder} was saved over, {_words(saved)}, got {_words(axes.sizes)}; train "
            "over such a mesh, or in another folder"
        )
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    return step, load_file(path)


def _write(path: Path, state: Mapping[str, Tensor], facts: dict[str, str]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, facts)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _index(folder: Path) -> dict[str, Any] | None:
    return read_object(folder / INDEX) if (folder / INDEX).exists() else None


def _part(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"


def _names(step: int) -> Any:
    yield f"step-{step}"
    number = 1
    while True:  # saved twice in a step, where the first is what the index names
        yield f"step-{step}.{number}"
        number += 1


def _words(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items()) or "one process"
