"""Names of tensors on disk and in memory.

They are equal, but for the routed experts: on disk each has its own three tensors, in memory all are fused.

    disk    mlp.experts.{i}.gate_proj.weight [I, D], mlp.experts.{i}.up_proj.weight [I, D],
            mlp.experts.{i}.down_proj.weight [D, I]
    memory  mlp.experts.gate_up_proj [E, 2I, D] (gate first), mlp.experts.down_proj [E, D, I]

The scales of FP8 weights stand beside them: weight_scale_inv on disk, gate_up_proj_scale_inv and down_proj_scale_inv in
memory. There, each half of gate_up_proj may be followed by rows that fill its last block.

Dims: E experts, I expert width, D model width, L layers.
Source: the checkpoints of DeepSeek-V3 and its README_WEIGHTS; ``conversion_mapping.py`` of transformers 5.23.
"""

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

SCALE = "_scale_inv"
"""Behind the name of an FP8 weight: the name of its scales."""
LAYER = re.compile(r"model\.layers\.(\d+)\.")
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
"""Of a multi-token-prediction layer: what it shares with the main model, stored again."""


Region = tuple[slice | list[int], ...]
"""Of a tensor: of each dimension a range, or indices of which some may come again; of none, all of it."""


class Piece(NamedTuple):
    """A tensor on disk, and the part of a tensor in memory that it is."""

    name: str
    key: str
    """Of the tensor in memory."""
    part: tuple[int | slice, ...] = ()
    region: Region = ()
    """Of the tensor on disk: what one of several processes takes of it."""


def pieces(key: str, shape: Iterable[int], expert_width: int, experts: Sequence[int] | None = None) -> Iterator[Piece]:
    """What a tensor in memory is on disk, expert by expert.

    Args:
        key: its name in the model's ``state_dict``.
        shape: its shape.
        expert_width: I, ``moe_intermediate_size``, or what one process has of it.
        experts: their numbers in the order they have in memory, where other processes have others; ``None``: all.
    """
    prefix, _, last = key.rpartition(".")
    if not prefix.endswith(".experts"):
        yield Piece(key, key)
        return
    count, rows, _ = shape
    weight = "weight" + (SCALE if last.endswith(SCALE) else "")
    half = rows // 2
    filled = half if last.endswith(SCALE) else min(half, expert_width)
    for i, number in enumerate(range(count) if experts is None else experts):
        expert = f"{prefix}.{number}"
        if last.startswith("down_proj"):
            yield Piece(f"{expert}.down_proj.{weight}", key, (i,))
        else:
            yield Piece(f"{expert}.gate_proj.{weight}", key, (i, slice(0, filled)))
            yield Piece(f"{expert}.up_proj.{weight}", key, (i, slice(half, half + filled)))


def has_no_place(name: str, stored: Container[str], num_layers: int, num_mtp_layers: int) -> bool:
    """Whether a tensor on disk is one that a model rightly does without.

    Args:
        name: its name.
        stored: names of all tensors on disk.
        num_layers: layers of the main model.
        num_mtp_layers: multi-token-prediction layers of the model, behind those.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return True
    found = LAYER.match(name)
    if found is None or int(found[1]) < num_layers:
        return False
    rest = name[found.end() :]
    return rest in COPIES or (int(found[1]) >= num_layers + num_mtp_layers and f"{found[0]}eh_proj.weight" in stored)


def mtp_layers_stored(stored: Iterable[str], num_layers: int) -> int:
    """How many layers there are behind the main model's, without a gap."""
    layers = {int(found[1]) for name in stored if (found := LAYER.match(name))}
    count = 0
    while num_layers + count in layers:
        count += 1
    return count
