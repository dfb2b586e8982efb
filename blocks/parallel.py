"""A model cut down to what one process of a mesh has of it, and the settings of that."""

from dataclasses import dataclass

import torch

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.cut import Cut
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.tensor_parallel import to_tensor_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a model is built over several processes."""

    mode: str = "dropless"
    """How tokens reach experts of other processes: ``dropless``, all of them."""

    def __post_init__(self) -> None:
        if self.mode != "dropless":
            raise ValueError(f"parallel: want mode 'dropless', got {self.mode!r}")


@torch.no_grad()
def to_parallel(model: CausalLM, parallel: Parallel, *, tensor: Axis | None, expert: Axis | None) -> None:
    """Cut a model down to one process's part, in place; names of parameters stay.

    Args:
        model: not quantized yet; on any device. On the meta device nothing is computed.
        parallel: how.
        tensor, expert: the axes that share weights; ``None`` for one that the mesh does not have.

    Raises:
        ValueError: the model cannot be dealt out evenly over them.
    """
    if expert is not None:
        to_expert_parallel(model, expert)
        for name, module in model.named_modules():
            if isinstance(module, MoE):
                for weight in ("gate_up_proj", "down_proj"):
                    model.cuts[f"{name}.experts.{weight}"] = (Cut(expert, 0),)
    if tensor is not None:
        to_tensor_parallel(model, tensor)
