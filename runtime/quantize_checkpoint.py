"""A checkpoint in full precision to one whose linear layers are in FP8, in the format of DeepSeek-V3's release.

    W8, scale_inv = quantize(W, E4M3, 128 x 128),    W[n, k] ~ W8[n, k] * scale_inv[n // 128, k // 128]

for the weights of attention, MLP and experts (``blocks/fp8.py`` says which); everything else is copied as it is:
embedding, head, router, norms, biases, ``eh_proj``. Tensors are read, quantized and written one at a time. All is written into a folder beside
the target and renamed at the end, so that a folder by the target's name is whole.

Source: README_WEIGHTS of DeepSeek-V3, section "FP8 Weight Documentation", and the tensors of its release;
``FineGrainedFP8Config`` of transformers 5.23.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepfuse.blocks.fp8 import BLOCK, E4M3, put, to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import checked_plan, present_mtp_layers
from deepfuse.runtime.checkpoint_files import (
    CheckpointError,
    durable,
    existing_folder,
    object_bytes,
    read_object,
    replace_file,
    temporary_name,
)
from deepfuse.runtime.config_json import FP8, read_config, weight_block_size
from deepfuse.runtime.loading_bar import LoadingBar
from deepfuse.runtime.save import MAX_SHARD_BYTES
from deepfuse.runtime.shards import (
    DTYPES,
    PICKLES,
    Reader,
    Stored,
    shard_files,
    split_in_shards,
    stored_tensors,
    write_shard,
)
from deepfuse.runtime.weight_names import SCALE, Piece, pieces

NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", ".*", *PICKLES)
"""Files of the source that the result has in another form, or not at all."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was done.

    Attributes:
        tensors: in the result, without scales.
        in_fp8: how many of these.
        bytes_before, bytes_after: of all tensors.
    """

    tensors: int
    in_fp8: int
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def quantize_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Quantized:
    """Write a checkpoint again with its linear layers in FP8.

    Args:
        source: a checkpoint folder in float32, bfloat16 or float16; it is only read.
        target: made; what else lies beside the weights in ``source`` (tokenizer, ...) is copied into it.
        max_shard_bytes: weights beyond it go into several files.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        FileExistsError: ``target`` does, or the folder in which it is made, left by a run that was killed.
        CheckpointError: ``source`` is no checkpoint, a damaged one or one in FP8 already; a weight is NaN or infinite.
        OSError: a full disk, for instance; nothing is left of the target then.
    """
    path, out = existing_folder(source), Path(target)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"quantize: want a folder that does not exist yet, got {str(out)!r}")
    stored = stored_tensors(path)
    if weight_block_size(config := read_config(path)) is not None:
        raise CheckpointError(f"{path}: want weights in full precision, got FP8 already (quantization_config)")
    with torch.device("meta"):
        model = CausalLM(config, mtp_layers=present_mtp_layers(path, config))
    checked_plan(model, path, stored)
    strange = [f"{name} ({tensor.dtype})" for name, tensor in stored.items() if tensor.dtype not in DTYPES]
    if strange:
        raise CheckpointError(f"{path}: want floating point tensors, got {', '.join(strange)}")

    # by name: experts that are fused in the source become tensors of their own
    I = config.moe_intermediate_size
    names = {piece.name: piece for name in stored for piece in pieces(name, stored[name].shape, I)}
    to_fp8(model)
    state = {key: t.shape for key, t in model.state_dict().items() if t.dtype == E4M3}
    in_fp8 = {piece.name for key, shape in state.items() for piece in pieces(key, shape, I)}
    layouts = {name: _layout(piece, stored[piece.key], in_fp8) for name, piece in names.items()}
    sizes = {name: sum(_nbytes(*entry) for entry in layout.values()) for name, layout in layouts.items()}
    shards = split_in_shards(sizes, max_shard_bytes)
    files, index = shard_files([[t for name in shard for t in layouts[name]] for shard in shards], sum(sizes.values()))
    small = index | {"config.json": object_bytes(read_object(path / "config.json") | {"quantization_config": FP8})}
    others = [p for p in sorted(path.iterdir()) if p.is_file() and not any(map(p.match, NOT_COPIED))]

    temporary = temporary_name(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"quantize: want no {str(temporary)!r}, which a run that was killed has left or another one is writing; "
            "where none is, remove it"
        ) from None
    before = sum(tensor.nbytes for tensor in stored.values())
    try:
        with Reader(stored) as reader, LoadingBar(f"quantizing {path.name}", before) as bar:
            for file, shard in zip(files, shards, strict=True):
                layout = {tensor: entry for name in shard for tensor, entry in layouts[name].items()}
                write_shard(
                    temporary / file, layout, _tensors(path, [names[name] for name in shard], layout, reader, bar)
                )
        for other in others:
            with durable(temporary / other.name) as copy, other.open("rb") as original:
                shutil.copyfileobj(original, copy)
        for name, content in small.items():
            replace_file(temporary / name, content)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Quantized(len(names), sum(len(layout) > 1 for layout in layouts.values()), before, sum(sizes.values()))


def _tensors(
    folder: Path, wanted: list[Piece], layout: Collection[str], reader: Reader, bar: LoadingBar
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard of the result, which are those of ``layout``, made as they are asked for."""
    for piece in wanted:
        tensor = reader.get(piece.key)[piece.part]
        if piece.name + SCALE not in layout:
            yield piece.name, tensor
        else:
            N, K = tensor.shape
            values, scale = torch.empty((N, K), dtype=E4M3), torch.empty((-(-N // BLOCK), -(-K // BLOCK)))
            put(values, scale, tensor)
            if not bool(scale.isfinite().all()):
                raise CheckpointError(f"{folder}: want finite weights, got {piece.name} with NaN or infinity")
            yield piece.name, values
            yield piece.name + SCALE, scale
            del values, scale
        bar.advance(tensor.numel() * tensor.element_size())
        del tensor


def _layout(piece: Piece, stored: Stored, in_fp8: Collection[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a tensor becomes: names, dtypes and shapes."""
    shape = tuple(torch.empty(stored.shape, device="meta")[piece.part].shape)
    if piece.name not in in_fp8:
        return {piece.name: (DTYPES[stored.dtype], shape)}
    N, K = shape
    return {piece.name: (E4M3, shape), piece.name + SCALE: (torch.float32, (-(-N // BLOCK), -(-K // BLOCK)))}


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
