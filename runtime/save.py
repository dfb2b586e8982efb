"""A model into a Hugging Face folder, whole or not at all.

Everything is written under temporary names in the folder first. Then the names are exchanged, weights first and
``config.json`` last: a kill while writing leaves the checkpoint of before; in the moment of the exchange, none rather
than a mixed one.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepfuse.blocks.fp8 import E4M3
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint_files import durable, existing_folder, object_bytes, temporary_name
from deepfuse.runtime.collected_weights import CollectedWeights
from deepfuse.runtime.config_json import config_object
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.shards import SINGLE, shard_files, split_in_shards, write_shard
from deepfuse.runtime.weight_names import pieces

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
MAX_SHARD_BYTES = 5_000_000_000
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_checkpoint(
    model: CausalLM,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    processes: Processes | None = None,
) -> None:
    """Write a checkpoint that transformers and :func:`~deepfuse.runtime.checkpoint.load_weights` read.

    Args:
        model: its weights are written as they are; experts one by one.
        folder: made where it does not exist; other files in it are left alone.
        source: a checkpoint folder to copy the files of ``TOKENIZER_FILES`` from, as far as it has them.
        files: the same from memory, by name; they go before those of ``source``.
        max_shard_bytes: weights beyond it go into several files.
        processes: of whom ``model`` is this one's part: all of them call it, and the first writes the whole.

    Raises:
        ValueError: the model has no weights (meta device), its configuration cannot be told to transformers, or
            ``files`` has another name.
        OSError: a full disk, for instance; the folder is then as it was.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError("save_checkpoint: want a model with weights, got one on the meta device")
    if processes is not None and processes.mesh is not None:
        weights = CollectedWeights(model, processes)
        options: dict[str, Any] = {"source": source, "files": files, "max_shard_bytes": max_shard_bytes}
        with processes.raising_together("save"):
            tensors = iter(weights)
            try:
                if weights.writer:
                    _write(model, Path(folder), weights.layout, tensors, **options)
            finally:
                for _ in tensors:  # the others send theirs, whatever became of the files
                    pass
        return
    on_disk = _on_disk(model.state_dict(), model.config.moe_intermediate_size)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in on_disk.items()}
    _write(model, Path(folder), layout, iter(on_disk.items()), source, files, max_shard_bytes)


def _write(
    model: CausalLM,
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterator[tuple[str, Tensor]],
    source: str | os.PathLike[str] | None,
    files: Mapping[str, bytes] | None,
    max_shard_bytes: int,
) -> None:
    """``tensors`` in the order of ``layout``, each let go before the next."""
    # some checkpoints leave these layers out
    config = replace(model.config, num_nextn_predict_layers=len(model.model.layers) - model.config.num_hidden_layers)
    small = _tokenizer_files(source, files or {})
    fp8 = any(dtype == E4M3 for dtype, _ in layout.values())
    last = {"config.json": object_bytes(config_object(config, layout["model.embed_tokens.weight"][0], fp8=fp8))}
    sizes = {name: shape.numel() * dtype.itemsize for name, (dtype, shape) in layout.items()}
    shards = split_in_shards(sizes, max_shard_bytes)
    names, index = shard_files(shards, sum(sizes.values()))
    last = index | last

    path.mkdir(parents=True, exist_ok=True)
    temporary: dict[str, Path] = {}
    try:
        for name, shard in zip(names, shards, strict=True):
            temporary[name] = temporary_name(path / name)
            write_shard(temporary[name], {tensor: layout[tensor] for tensor in shard}, islice(tensors, len(shard)))
        for name, content in (small | last).items():
            temporary[name] = temporary_name(path / name)
            with durable(temporary[name]) as out:
                out.write(content)
        _exchange(path, temporary)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


def _exchange(path: Path, temporary: Mapping[str, Path]) -> None:
    """Give the files their names; what belongs to the checkpoint of before goes."""
    weights = {p.name for p in path.iterdir() if WEIGHT_FILE.fullmatch(p.name)}
    config = path / "config.json"
    changed = config.exists() and config.read_bytes() != temporary["config.json"].read_bytes()
    if config.exists() and (changed or weights | {SINGLE} != {SINGLE} or SINGLE not in temporary):
        # several names cannot be exchanged at once; without this one, nothing in between passes for a checkpoint
        config.unlink()
    for name in weights - temporary.keys():
        (path / name).unlink()
    for name, written in temporary.items():
        written.replace(path / name)


def _on_disk(state: Mapping[str, Tensor], expert_width: int) -> dict[str, Tensor]:
    """Tensors by their names on disk; views of the model's."""
    return {
        piece.name: tensor[piece.part]
        for key, tensor in state.items()
        for piece in pieces(key, tensor.shape, expert_width)
    }


def _tokenizer_files(source: str | os.PathLike[str] | None, files: Mapping[str, bytes]) -> dict[str, bytes]:
    unknown = sorted(set(files) - set(TOKENIZER_FILES))
    if unknown:
        raise ValueError(f"save_checkpoint: want files out of {list(TOKENIZER_FILES)}, got {unknown}")
    out: dict[str, Any] = {}
    if source is not None:
        folder = existing_folder(source)
        out = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return out | dict(files)
