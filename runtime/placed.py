"""What a placement of experts is worth, and what it costs, for the report of a build."""

from dataclasses import asdict, dataclass
from typing import Any

from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.placement import Placement


@dataclass(frozen=True, slots=True)
class Placed:
    """Of one process.

    Attributes:
        redundant: slots of a layer beyond one for each expert, over all processes.
        redundant_bytes: that these take of this process's memory, on average of the processes.
        before, after: of each layer, load of the busiest process over the mean: experts in order, and as placed.
    """

    redundant: int
    redundant_bytes: int
    before: tuple[float, ...]
    after: tuple[float, ...]

    def __str__(self) -> str:
        mean = [sum(layers) / len(layers) for layers in (self.before, self.after)]
        return (
            f"busiest process over the mean {mean[0]:.3f} -> {mean[1]:.3f}, in the worst of {len(self.before)} layers "
            f"{max(self.before):.3f} -> {max(self.after):.3f}; {self.redundant} redundant experts a layer, "
            f"{self.redundant_bytes / 1e6:,.2f} MB of this process"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def placed(placement: Placement, model: CausalLM) -> Placed:
    """``placement`` in the part of a model that a process has."""
    experts = [module.experts for module in model.modules() if isinstance(module, MoE)]
    weights = sum(parameter.nbytes for module in experts for parameter in module.parameters())
    redundant = placement.slots - placement.experts
    return Placed(
        redundant=redundant,
        redundant_bytes=weights * redundant // placement.slots,
        before=tuple(placement.before.tolist()),
        after=tuple(placement.after.tolist()),
    )
