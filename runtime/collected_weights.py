"""The weights of a model that several processes have parts of, tensor by tensor, in the process that writes them.

Each sends what the writer lacks, region by region; of those that have the same, the first of axis ``data``. The writer
holds one tensor of the files at a time. All processes go through the tensors in one order.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parametrize

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.cut import Cut
from deepfuse.blocks.fp8 import BLOCK
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.axes import holders
from deepfuse.runtime.process_part import whole_model
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.weight_names import SCALE, pieces


class CollectedWeights:
    """What a checkpoint of the whole model has.

    Attributes:
        layout: name on disk -> dtype and shape.
        writer: whether this process gets the tensors.
    """

    def __init__(self, model: CausalLM, processes: Processes):
        """All processes make it, and iterate over it, at the same time."""
        assert processes.mesh is not None and processes.mesh.mesh_dim_names is not None
        self.model, self.axes = model, processes.axes
        self.whole = {key: tensor.shape for key, tensor in whole_model(model).state_dict().items()}
        width = model.config.moe_intermediate_size
        self.places = [(p, key) for key, shape in self.whole.items() for p in pieces(key, shape, width)]
        shapes = {p.name: torch.empty(self.whole[key], device="meta")[p.part].shape for p, key in self.places}
        self.layout = {p.name: (_dtype(model, key), shapes[p.name]) for p, key in self.places}
        self.ranks = holders(processes.mesh.mesh, processes.mesh.mesh_dim_names)
        self.writer = self.axes.rank == self.ranks[0, 0]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, of none a second time; elsewhere than in the writer the tensors are empty."""
        last, own = "", torch.empty(0)
        for piece, key in self.places:
            if key != last:  # gathered once, where it lies in parts over processes with tokens of their own
                last, own = key, _tensor(self.model, key)
            yield piece.name, self._collected(piece.name, key, own)

    def _collected(self, name: str, key: str, own: Tensor) -> Tensor:
        dtype, shape = self.layout[name]
        out = torch.empty(shape if self.writer else 0, dtype=dtype, device=own.device)
        cuts = self.model.cuts.get(key.removesuffix(SCALE), ())
        expert = next((cut for cut in cuts if cut.axis == self.axes.expert), None)
        tensor = next((cut for cut in cuts if cut.axis == self.axes.tensor), None)
        e = 0 if expert is None else expert.holder(_number(name), self.whole[key][0])
        for t in range(1 if tensor is None else tensor.axis.size):
            rank = self.ranks[t, e]
            if self.axes.rank == rank:
                part = self._part(name, key, own, expert)
            if self.writer:
                region = out[_region(name, key, shape, tensor, t)]
                if self.axes.rank != rank:
                    part = torch.empty(region.shape, dtype=dtype, device=own.device)
                    dist.recv(part.view(torch.uint8), rank)
                region.copy_(part)
            elif self.axes.rank == rank:
                dist.send(part.contiguous().view(torch.uint8), self.ranks[0, 0])
        return out

    def _part(self, name: str, key: str, own: Tensor, expert: Cut | None) -> Tensor:
        size = 1 if self.axes.tensor is None else self.axes.tensor.size
        experts = None if expert is None else expert.indices(self.whole[key][0], "experts")
        found = pieces(key, own.shape, self.model.config.moe_intermediate_size // size, experts)
        return own[next(piece.part for piece in found if piece.name == name)]


def _region(name: str, key: str, shape: torch.Size, cut: Cut | None, rank: int) -> tuple[slice, ...]:
    """Of a tensor on disk: what process ``rank`` of axis ``tensor`` has."""
    region = [slice(None)] * len(shape)
    if cut is not None:
        dim = cut.dim if name == key else cut.dim - 1
        axis: Axis = replace(cut.axis, rank=rank)
        region[dim] = axis.share(shape[dim], f"blocks of {BLOCK} of {name}" if name.endswith(SCALE) else name)
    return tuple(region)


def _number(name: str) -> int:
    """Of the expert that a tensor on disk belongs to."""
    return int(name.partition(".experts.")[2].partition(".")[0])


def _tensor(model: CausalLM, key: str) -> Tensor:
    parent, _, last = key.rpartition(".")
    found: Tensor = getattr(model.get_submodule(parent), last)
    return found.detach()


def _dtype(model: CausalLM, key: str) -> torch.dtype:
    parent, _, last = key.rpartition(".")
    module: Any = model.get_submodule(parent)
    if parametrize.is_parametrized(module, last):
        module, last = module.parametrizations[last], "original"
    found: Tensor = getattr(module, last)
    return found.dtype
