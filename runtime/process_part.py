"""What one of several processes reads of a checkpoint: its own experts, and of other tensors its rows and columns.

The model says which part of each parameter it has (``CausalLM.cuts``); on disk, where each expert's tensors are by
themselves, that is a region of a tensor, or none of it. Scales of FP8 weights go with the blocks they belong to.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from deepfuse.blocks.cut import Cut
from deepfuse.blocks.fp8 import FP8Experts, FP8Linear, to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint_files import CheckpointError
from deepfuse.runtime.shards import Stored
from deepfuse.runtime.weight_names import SCALE, Piece, Region, pieces


def whole_model(model: CausalLM) -> CausalLM:
    """The model of which one process has a part, on the meta device."""
    in_fp8 = {name for name, module in model.named_modules() if isinstance(module, FP8Linear | FP8Experts)}
    with torch.device("meta"):
        whole = CausalLM(model.config, mtp_layers=len(model.model.layers) - model.config.num_hidden_layers)
        to_fp8(whole, wanted=in_fp8.__contains__)
    return whole


def own_pieces(
    model: CausalLM, key: str, shape: Iterable[int], stored: Mapping[str, Stored], block: tuple[int, int] | None
) -> Iterator[Piece]:
    """What a tensor of a process is on disk, with the regions of what it has in part.

    Args:
        key, shape: name and shape of one of the tensors of ``model``.
        stored: the tensors on disk; those that are not there have no region.
        block: of FP8 weights on disk.

    Raises:
        CheckpointError: a region cannot be read by itself.
    """
    cuts = model.cuts.get(key.removesuffix(SCALE), ())
    if key.removesuffix(SCALE) in stored:  # whole, or fused on disk as well
        found: Iterable[Piece] = [Piece(key, key)]
    else:
        dealt = next((cut for cut in cuts if cut.dim == 0), None)
        width = next((cut.axis.size for cut in cuts if cut.dim != 0), 1)
        experts = None if dealt is None else dealt.indices(model.config.n_routed_experts or 0, "n_routed_experts")
        named = pieces(key, shape, model.config.moe_intermediate_size // width, experts)
        # of an expert in two slots the first is read, and the other copied from it
        found = {piece.name: piece for piece in reversed(list(named))}.values()
    for piece in found:
        # an expert of its own has a dimension less
        own = cuts if piece.name == key else [Cut(cut.axis, cut.dim - 1) for cut in cuts if cut.dim > 0]
        yield piece._replace(region=_region(piece.name, own, stored, block))


def _region(name: str, cuts: Iterable[Cut], stored: Mapping[str, Stored], block: tuple[int, int] | None) -> Region:
    weight = name.removesuffix(SCALE)
    if weight not in stored or not cuts:
        return ()
    shape = stored[weight].shape
    region: list[slice | list[int]] = [slice(0, size) for size in shape]
    for cut in cuts:
        if cut.stretches > 1:
            raise CheckpointError(
                f"mesh: want each expert by itself on disk, to deal out its width over axis {cut.axis.name!r}, got all "
                f"of them in {name}; save the checkpoint anew with deepfuse"
            )
        what = f"dimension {cut.dim} of {name}"
        own = cut.indices(shape[cut.dim], what)
        region[cut.dim] = list(own) if cut.slots else slice(own[0], own[-1] + 1)
    if stored[weight].dtype != "F8_E4M3" or block is None:
        return tuple(region)
    widths = (*[1] * (len(shape) - 2), *block)
    for part, width, cut in ((region[cut.dim], widths[cut.dim], cut) for cut in cuts):
        size = len(range(*part.indices(shape[cut.dim]))) if isinstance(part, slice) else len(part)
        if size % width:
            raise CheckpointError(
                f"mesh: want each process's part of {weight} in whole FP8 blocks of {width}, got {size} of "
                f"{shape[cut.dim]}; choose a smaller axis {cut.axis.name!r}, or a checkpoint that is not in FP8"
            )
    return tuple(region) if name == weight else scale_region(tuple(region), block)


def scale_region(region: Region, block: tuple[int, int]) -> Region:
    """Of the scales that belong to a region of whole blocks; the last ones may be cut off at the edge. Of all, all."""
    if not region:
        return ()
    widths = (*[1] * (len(region) - 2), *block)
    # indices are of experts, of which each has blocks of its own
    return tuple(
        slice(r.start // n, -(-r.stop // n)) if isinstance(r, slice) else r for r, n in zip(region, widths, strict=True)
    )
