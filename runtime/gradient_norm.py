"""The norm of all gradients, over processes that have parts of them."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from deepfuse.blocks.cut import Cut
from deepfuse.runtime.axes import Axes


def clip_gradients(
    parameters: Mapping[str, nn.Parameter], cuts: Mapping[str, tuple[Cut, ...]], axes: Axes, clip_norm: float
) -> None:
    """Scale gradients so that the norm of all of them together is at most ``clip_norm``; of those that there are.

    Args:
        parameters: of this process, by name. Of any two with tokens of their own, none has numbers that the other has.
        cuts: which of them are parts over axis ``tensor``; the others are on each of its processes, and count once.
        axes: of the mesh.
        clip_norm: of the whole model's gradients.
    """
    found = {name: p for name, p in parameters.items() if p.grad is not None}
    if axes.size == 1:
        nn.utils.clip_grad_norm_(found.values(), clip_norm)
        return
    first = next(iter(parameters.values()))
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for name, parameter in found.items():
        assert parameter.grad is not None
        copies = (
            1 if axes.tensor is None or any(c.axis == axes.tensor for c in cuts.get(name, ())) else axes.tensor.size
        )
        total += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) ** 2 / copies
    dist.all_reduce(total)
    nn.utils.clip_grads_with_norm_(found.values(), clip_norm, total.sqrt().float())
