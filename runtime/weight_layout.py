"""Weights that are read together lie together, so that one product can read them as one matrix.

A block names its submodules of one input in ``side_by_side``; their weights, and the scales of FP8 weights, are laid
one behind the other in one storage. Each stays a parameter of its own: saved and loaded by its name, and written in
place. What is moved to another device or dtype lies by itself again, and is read by itself.
"""

import hashlib
from collections import defaultdict

import torch
from torch import Tensor, nn

from deepfuse.ir.private import storage_id


@torch.no_grad()
def lay_side_by_side(model: nn.Module) -> None:
    """Move the weights that blocks name together; beyond them it takes the memory of one such group."""
    for module in model.modules():
        for names in getattr(module, "side_by_side", ()):
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                _lay([getattr(module, name) for name in names])


def _lay(modules: list[nn.Module]) -> None:
    for name, first in modules[0].named_parameters(recurse=False):
        parameters: list[nn.Parameter] = [getattr(module, name, None) for module in modules]  # type: ignore[misc]
        kinds = {None if p is None else (p.dtype, p.device, p.shape[1:]) for p in parameters}
        if first.ndim != 2 or len(kinds) > 1:
            continue
        whole = torch.empty((sum(len(p) for p in parameters), first.shape[1]), dtype=first.dtype, device=first.device)
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part.copy_(parameter)


def layout_key(model: nn.Module) -> str:
    """Which parameters share memory, and where in it they lie; empty where none do.

    Graphs that read one parameter through another are right for models of one such key only.
    """
    together: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        together[storage_id(parameter)].append((name, parameter))
    shared = [[(name, p.storage_offset()) for name, p in group] for group in together.values() if len(group) > 1]
    return hashlib.sha256(repr(shared).encode()).hexdigest() if shared else ""
