"""The safetensors files of a checkpoint folder: which tensors lie where, read one at a time, and written.

A folder has ``model.safetensors``, or shards and ``model.safetensors.index.json``, whose ``weight_map`` names the shard
of each tensor. Files are memory-mapped; what was touched of a mapping stays resident until the file is closed, so a
file is opened anew whenever as much was read as its largest tensor holds.
Source: the safetensors format (github.com/huggingface/safetensors, README).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepfuse.runtime.checkpoint_files import CheckpointError, durable, object_bytes, read_object
from deepfuse.runtime.weight_names import Region

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The floating dtypes of the format that checkpoints of this family use."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file's header describes it."""

    file: Path
    dtype: str
    """In the words of the format; see ``DTYPES``."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 8)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint folder by name, file by file and in the order they lie in the files.

    Raises:
        CheckpointError: there is no safetensors checkpoint, or its index or a file is damaged.
    """
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    placed = _weight_map(folder / INDEX)
    files = sorted(set(placed.values()))
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder / INDEX}: want all files it names, got none called {', '.join(missing)}")
    headers = {name: _header(folder / name) for name in files}
    lost = [f"{tensor} in {file}" for tensor, file in placed.items() if tensor not in headers[file]]
    if lost:
        raise CheckpointError(f"{folder / INDEX}: want tensors where it says, got no {', no '.join(lost)}")
    return {t: stored for file, header in headers.items() for t, stored in header.items() if placed.get(t) == file}


def region_bytes(stored: Stored, region: Region) -> int:
    """Bytes of a region of a tensor."""
    taken = [
        len(range(*part.indices(size))) if isinstance(part, slice) else len(set(part))
        for part, size in zip(region, stored.shape, strict=False)
    ]
    whole = math.prod(stored.shape[: len(taken)])
    return stored.nbytes // whole * math.prod(taken) if whole else 0


class Reader:
    """Gives the tensors of a checkpoint, as views of the mapped files: drop one before you take the next."""

    def __init__(self, tensors: Mapping[str, Stored]):
        self.tensors = tensors
        self.largest: dict[Path, int] = {}
        for stored in tensors.values():
            self.largest[stored.file] = max(self.largest.get(stored.file, 0), stored.nbytes)
        self._path: Path | None = None
        self._file: Any = None
        self._read = 0
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def get(self, name: str, region: Region = ()) -> Tensor:
        """A tensor on the CPU, in the dtype and shape it has on disk, or a region of it: the rest is not read."""
        stored = self.tensors[name]
        wanted = region_bytes(stored, region)
        if self._path != stored.file or self._read + wanted > self.largest[stored.file]:
            self._close()
            self._file, self._path = _open(stored.file), stored.file
        self._read += wanted
        self.bytes_read += wanted
        try:
            return self._file.get_tensor(name)[region]
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise _damaged(stored.file, error) from None

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file, self._path, self._read = None, None, 0


def split_in_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into shards of at most ``max_shard_bytes``; a larger tensor has a shard to itself."""
    if max_shard_bytes < 1:
        raise ValueError(f"checkpoint: want max_shard_bytes >= 1, got {max_shard_bytes}")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_files(shards: Sequence[Sequence[str]], total_bytes: int) -> tuple[list[str], dict[str, bytes]]:
    """File names of shards, and the index by its file name where there is more than one.

    Args:
        shards: names of the tensors in each.
        total_bytes: of all tensors.
    """
    if len(shards) == 1:
        return [SINGLE], {}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    return names, {INDEX: object_bytes({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})}


def write_shard(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file.

    Args:
        path: of the file.
        layout: dtype and shape of all tensors that will be in it.
        tensors: the same ones in any order; they are asked for one by one, and each is let go before the next.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # widest first, so that each tensor is aligned to its own elements
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = set(layout)
    with durable(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert (tensor.dtype, list(tensor.shape)) == (layout[name][0], list(layout[name][1])), name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            missing.remove(name)
            del tensor  # a generator may be about to make the next
    assert not missing, f"tensors not given: {sorted(missing)}"


def _header(path: Path) -> dict[str, Stored]:
    with _open(path) as file:
        out = {}
        for name in file.offset_keys():
            part = file.get_slice(name)
            out[name] = Stored(path, str(part.get_dtype()), tuple(part.get_shape()))
        return out


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(
        f"{path}: want a whole safetensors file, got {size} bytes that are not one ({error}); it is truncated or "
        "corrupted: fetch it again"
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, all inside the folder."""
    placed = read_object(path).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()) or not placed:
        raise CheckpointError(f"{path}: want weight_map, an object from tensor names to file names, got {placed!r:.80}")
    for name in sorted(set(placed.values())):
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
        absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
        if absolute or ".." in parts or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: want safetensors files inside the folder, got {name!r}")
    return placed


def _no_weights(folder: Path) -> CheckpointError:
    found = sorted({p.name for pattern in PICKLES for p in folder.glob(pattern)})
    if found:
        return CheckpointError(
            f"{folder}: want safetensors, got {_listed(found)}: pickle files, which can run any code when read, and are "
            "never opened here; where you trust them, convert them with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained('converted')"
        )
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    return CheckpointError(f"{folder}: want {SINGLE} or {INDEX}, got {_listed(found) if found else 'neither'}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
