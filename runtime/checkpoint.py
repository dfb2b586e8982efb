"""Weights of a Hugging Face folder into a model, and a model into such a folder.

Loading goes through the files once: a tensor is mapped, copied into its place (converted, quantized, dequantized, or
fused with its neighbours there) and let go, so that the peak is the model and one tensor. FP8 weights stay FP8 where the
model has FP8 modules (``blocks/fp8.py``); elsewhere they are dequantized,

    W[n, k] = W8[n, k] * scale_inv[n // N, k // K],    blocks of N x K, the last ones cut off at the edge.

Source: README_WEIGHTS of DeepSeek-V3, section "FP8 Weight Documentation".
"""

import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepfuse.blocks.capacity import Capacity
from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import BLOCK, E4M3, put, to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Router
from deepfuse.blocks.replicas import Replicas
from deepfuse.blocks.rotary import Rotary, inverse_frequencies
from deepfuse.runtime.checkpoint_files import CheckpointError, existing_folder
from deepfuse.runtime.config_json import named_dtype, read_config, weight_block_size
from deepfuse.runtime.loading_bar import LoadingBar
from deepfuse.runtime.process_part import own_pieces, scale_region, whole_model
from deepfuse.runtime.save import save_checkpoint
from deepfuse.runtime.shards import DTYPES, Reader, Stored, region_bytes, stored_tensors
from deepfuse.runtime.weight_layout import parts
from deepfuse.runtime.weight_names import SCALE, Piece, has_no_place, mtp_layers_stored, pieces

__all__ = [
    "CheckpointError",
    "load_weights",
    "present_mtp_layers",
    "rebuild_buffers",
    "save_checkpoint",
    "stored_dtype",
    "stored_in_fp8",
    "weights_bytes",
]
FLOATS = ("F64", "F32", "F16", "BF16")
LISTED = 100
"""Names of a kind that an error lists; a wrong configuration has tens of thousands."""


class Plan(NamedTuple):
    """Which tensors on disk go where."""

    pieces: list[Piece]
    """In the order they lie on disk."""
    problems: dict[str, list[str]]
    """Kind of problem -> the tensors."""
    scales: dict[str, Piece]
    """Of weights that are quantized now: name of the weight on disk -> place of its scales."""


@torch.no_grad()
def load_weights(
    model: CausalLM,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    allow_nan: bool = False,
    together: Iterable[Sequence[str]] = (),
) -> None:
    """Give a model the weights of a checkpoint folder.

    Args:
        model: built under ``torch.device("meta")``; it is filled, or left as it is where an error is raised. What has
            FP8 modules there gets FP8 weights: those of the files, or such as are quantized now. Of what it has a part
            (see ``CausalLM.cuts``), nothing else is read.
        folder: as transformers writes it; see :func:`present_mtp_layers` for how many of these layers to build.
        device: where the weights go.
        dtype: of all weights but FP8 ones, their scales and the router's bias, which stay as they are.
        allow_nan: take NaN and infinite weights; otherwise they are an error.
        together: names of parameters of one dtype that are to lie one behind the other, group by group.

    Raises:
        FileNotFoundError: the folder does not exist.
        CheckpointError: it is no checkpoint or a damaged one; tensors are missing, unexpected or of a wrong shape (all
            are named); weights are NaN or infinite.
    """
    path = existing_folder(folder)
    stored = stored_tensors(path)
    block = weight_block_size(model.config)
    wanted = model.state_dict()
    plan = checked_plan(model, path, stored)
    dtypes = {k: _dtype_of(k, v, dtype) for k, v in wanted.items()}
    laid: dict[str, Tensor] = {}
    for names in together:
        whole = functools.partial(_empty, dtype=dtypes[names[0]], device=device)
        laid |= zip(names, parts([wanted[name].shape for name in names], whole), strict=True)
    state = {k: laid[k] if k in laid else _empty(v.shape, dtypes[k], device) for k, v in wanted.items()}
    broken = []
    total = sum(region_bytes(stored[piece.name], piece.region) for piece in plan.pieces)
    with Reader(stored) as reader, LoadingBar(f"loading {path.name}", total) as bar:
        for piece in plan.pieces:
            target, region = state[piece.key][piece.part], piece.region
            scales = () if block is None else scale_region(region, block)
            if target.dtype == E4M3 and piece.name not in plan.scales:
                target.copy_(reader.get(piece.name, region))
            elif target.dtype == E4M3:
                weight = reader.get(piece.name, region).to(device)
                if piece.name + SCALE in stored:  # in other blocks
                    assert block is not None
                    weight, values = torch.empty(weight.shape, device=device), weight
                    _dequantize(weight, values, reader.get(piece.name + SCALE, scales).to(device, torch.float32), block)
                # what is behind a weight's last rows are those that fill a block, and not its own
                place = plan.scales[piece.name]
                put(target, state[place.key][place.part], weight)
                target = state[place.key][place.part]
            elif piece.name + SCALE in stored:
                assert block is not None
                scale = reader.get(piece.name + SCALE, scales).to(device, torch.float32, copy=True)
                _dequantize(target, reader.get(piece.name, region).to(device), scale, block)
            else:
                target.copy_(reader.get(piece.name, region))
            if not _finite(target):
                broken.append(piece.name)
            bar.advance(region_bytes(stored[piece.name], region))
    if broken and not allow_nan:
        text = _listed({f"NaN or infinite in {dtype}": broken})
        raise CheckpointError(
            f"{path}: want finite weights, got {text}; load_weights(allow_nan=True) takes them as they are"
        )
    _copy_again(model, state)
    model.load_state_dict(state, assign=True)
    rebuild_buffers(model, torch.device(device))


def checked_plan(model: CausalLM, folder: Path, stored: Mapping[str, Stored]) -> Plan:
    """Which tensors on disk go where in a model, which may be on the meta device.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of a wrong shape or dtype; all are named.
    """
    block = weight_block_size(model.config)
    # where a process has a part of the model, the files must still have all of it
    plan = _plan(whole_model(model) if model.cuts else model, stored, block)
    if any(plan.problems.values()):
        raise CheckpointError(f"{folder}: want the tensors of its config.json, got {_listed(plan.problems)}")
    return _own_plan(model, plan, stored, block) if model.cuts else plan


def present_mtp_layers(folder: str | os.PathLike[str], config: Config) -> int:
    """How many of the multi-token-prediction layers that ``config`` names the checkpoint has: some leave them out."""
    stored = stored_tensors(existing_folder(folder))
    return min(config.num_nextn_predict_layers, mtp_layers_stored(stored, config.num_hidden_layers))


def stored_dtype(folder: str | os.PathLike[str]) -> torch.dtype:
    """The dtype a checkpoint is meant to be computed in: what ``config.json`` names, or else that of its tensors.

    FP8 counts as bfloat16, in which the rest of such a checkpoint is, and float64 as float32.
    """
    path = existing_folder(folder)
    config = read_config(path)
    dtype = named_dtype(config)
    if dtype is None:
        dtypes = [DTYPES[s.dtype] for s in stored_tensors(path).values() if s.dtype in DTYPES]
        dtype = dtypes[0] if weight_block_size(config) is None and dtypes else torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype


def stored_in_fp8(folder: str | os.PathLike[str], config: Config) -> tuple[set[str], set[str]]:
    """Names of the modules whose weights a checkpoint has in FP8: all of them, in blocks that FP8 modules can take; the
    others that have some."""
    stored = stored_tensors(existing_folder(folder))
    with torch.device("meta"):
        model = CausalLM(config, mtp_layers=present_mtp_layers(folder, config))
    names = to_fp8(model, wanted=lambda name: name != "lm_head")
    kinds: dict[str, set[str]] = {name: set() for name in names}
    for key, tensor in model.state_dict().items():
        if tensor.dtype == E4M3:
            found = pieces(key, tensor.shape, config.moe_intermediate_size)
            names_of = (key, *(piece.name for piece in found))
            kinds[key.rpartition(".")[0]] |= {stored[name].dtype for name in names_of if name in stored}
    some = {name for name in names if "F8_E4M3" in kinds[name]}
    whole = {name for name in some if kinds[name] == {"F8_E4M3"} and weight_block_size(config) == (BLOCK, BLOCK)}
    return whole, some - whole


def weights_bytes(
    config: Config,
    dtype: torch.dtype,
    *,
    in_fp8: Collection[str] = (),
    cut: Callable[[CausalLM], None] | None = None,
) -> int:
    """Bytes of the model's weights in memory, counted on the meta device.

    Args:
        in_fp8: names of FP8 modules.
        cut: leaves a model the part of one process.
    """
    with torch.device("meta"):
        model = CausalLM(config)
        if cut is not None:
            cut(model)
        to_fp8(model, wanted=in_fp8.__contains__)
    return sum(v.numel() * _dtype_of(k, v, dtype).itemsize for k, v in model.state_dict().items())


def _dtype_of(key: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if tensor.dtype == E4M3:
        return E4M3
    # rounded, the bias would move tokens between experts
    return torch.float32 if key.endswith(("e_score_correction_bias", SCALE)) else dtype


def _empty(shape: Iterable[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if dtype == E4M3:  # what no tensor on disk fills are the zeros behind an expert's last rows
        return torch.zeros(tuple(shape), dtype=torch.uint8, device=device).view(E4M3)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _plan(model: CausalLM, stored: Mapping[str, Stored], block: tuple[int, int] | None) -> Plan:
    wanted = model.state_dict()
    placed: dict[str, Piece] = {}
    for key, tensor in wanted.items():
        # fused on disk as well, or one by one
        whole = key.removesuffix(SCALE) in stored
        found = [Piece(key, key)] if whole else list(pieces(key, tensor.shape, model.config.moe_intermediate_size))
        placed |= {piece.name: piece for piece in found}
    in_fp8 = {name for name in placed if name in stored and stored[name].dtype == "F8_E4M3"}
    scales = {name + SCALE for name in in_fp8}
    # scales of other blocks are read with their weight, which is quantized anew
    kept = scales if block == (BLOCK, BLOCK) else set()
    made = {n.removesuffix(SCALE): p for n, p in placed.items() if n.endswith(SCALE) and n not in kept}
    placed = {name: piece for name, piece in placed.items() if not name.endswith(SCALE) or name in kept}
    L, tied = model.config.num_hidden_layers, model.lm_head is None
    mtp = len(model.model.layers) - L
    unexpected = [
        name
        for name, tensor in stored.items()
        if name not in placed
        and name not in scales
        and not (tied and name == "lm_head.weight")
        and 0 not in tensor.shape
        and not has_no_place(name, stored, L, mtp)
    ]
    shapes, dtypes = [], []
    for name, piece in placed.items():
        if name not in stored:
            continue
        want, got = wanted[piece.key][piece.part].shape, stored[name].shape
        shapes += _compare(name, want, got)
        if name not in in_fp8:
            taken = stored[name].dtype in FLOATS or (name in scales and stored[name].dtype == "F8_E8M0")
            dtypes += [] if taken else [f"{name} ({stored[name].dtype})"]
        elif block is None or len(want) < 2:
            dtypes.append(f"{name} (FP8, {'without quantization_config' if block is None else 'of one dimension'})")
        elif name + SCALE in stored:
            scale = stored[name + SCALE]
            shapes += _compare(name + SCALE, (*want[:-2], *_blocks(want[-2:], block)), scale.shape)
            dtypes += [] if scale.dtype in (*FLOATS, "F8_E8M0") else [f"{name + SCALE} ({scale.dtype})"]
    problems = {
        "missing": [name for name in (*placed, *sorted(scales - placed.keys())) if name not in stored],
        "unexpected": unexpected,
        "of a wrong shape": shapes,
        "of a wrong dtype": dtypes,
    }
    return Plan([placed[name] for name in stored if name in placed], problems, made)


def _own_plan(model: CausalLM, plan: Plan, stored: Mapping[str, Stored], block: tuple[int, int] | None) -> Plan:
    """Of a plan for the whole model, what one process does."""
    found = [
        p for key, tensor in model.state_dict().items() for p in own_pieces(model, key, tensor.shape, stored, block)
    ]
    placed = {piece.name: piece for piece in found}
    made = {name: placed[name + SCALE] for name in plan.scales if name in placed}
    return Plan([placed[piece.name] for piece in plan.pieces if piece.name in placed], plan.problems, made)


def _compare(name: str, want: Iterable[int], got: Iterable[int]) -> list[str]:
    return [] if tuple(want) == tuple(got) else [f"{name} (want {list(want)}, got {list(got)})"]


def _blocks(shape: Iterable[int], block: tuple[int, int]) -> list[int]:
    return [-(-size // width) for size, width in zip(shape, block, strict=True)]


def _listed(problems: Mapping[str, list[str]]) -> str:
    def lines() -> Iterator[str]:
        for kind, names in problems.items():
            if names:
                more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
                yield f"{len(names)} {kind}:" + "".join(f"\n  {name}" for name in names[:LISTED] + more)

    return "\n".join(lines())


def _dequantize(out: Tensor, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """``out[n, k] = weight[n, k] * scale[n // N, k // K]`` of ``[..., n, k]``, one row of blocks at a time."""
    N, K = block
    for i in range(scale.shape[-2]):
        rows = slice(i * N, (i + 1) * N)
        columns = scale[..., i, :].repeat_interleave(K, -1)[..., : weight.shape[-1]]
        out[..., rows, :] = weight[..., rows, :].float() * columns[..., None, :]


def _copy_again(model: CausalLM, state: Mapping[str, Tensor]) -> None:
    """Experts that this process has in a further slot, from the first, which was read."""
    for key, tensor in state.items():
        for cut in model.cuts.get(key.removesuffix(SCALE), ()):
            own = list(cut.indices(len(cut.slots), "slots")) if cut.slots else []
            for slot, expert in enumerate(own):
                if (first := own.index(expert)) != slot:
                    tensor[slot].copy_(tensor[first])


def _finite(x: Tensor) -> bool:
    """Without a temporary the size of ``x``, as ``isfinite`` makes: NaN wins over any minimum and maximum."""
    if x.dtype == E4M3:  # which has no infinities
        return not bool(x.isnan().any())
    return x.numel() == 0 or all(bool(end.isfinite()) for end in x.aminmax())


def rebuild_buffers(model: CausalLM, device: torch.device) -> None:
    """Buffers that are computed, and not in a checkpoint."""
    for module in model.modules():
        if isinstance(module, Rotary):
            c = model.config
            module.inv_freq = inverse_frequencies(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling).to(device)
        elif isinstance(module, Router):
            module.tokens_per_expert = torch.zeros(module.tokens_per_expert.shape, dtype=torch.float32, device=device)
        elif isinstance(module, Replicas):
            module.rebuild(device)
        elif isinstance(module, Capacity):
            module.dropped = torch.zeros_like(module.dropped, device=device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that nothing rebuilds: {left}"
