"""An expert in several slots: which of its copies a token goes to.

    slot[t, k] = slots of expert[t, k] [(t + rank) % copies]

By turns with the place of a token in its batch, beginning on each process with another copy: so copies get about as much,
in a decode step of one token a process too, and nobody is asked how much others have. Copies have the same weights: which
one it is changes no number, but for the rows that a product has beside a token's.
Dims: T tokens, K experts per token, E experts, S slots, C copies at most.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepfuse.blocks.placement import slots_of_experts


class Replicas(nn.Module):
    """``experts [T, K]`` out of E -> slots ``[T, K]`` out of S; for inference."""

    slot_of_copy: Tensor
    copies: Tensor

    def __init__(self, expert_of_slot: Sequence[int], num_experts: int, *, most: int, rank: int):
        """
        Args:
            expert_of_slot: of each of the S slots; each of the E experts has one or more.
            most: C, of any layer, so that layers are alike.
            rank: of this process among those that share the slots.
        """
        super().__init__()
        self.num_slots = len(expert_of_slot)
        held = slots_of_experts(expert_of_slot, num_experts)
        self._copies = [len(slots) for slots in held]
        # the first again where there are fewer: never chosen
        turned = [[slots[(copy + rank) % len(slots)] for copy in range(len(slots))] for slots in held]
        self._slots = [slots + slots[:1] * (most - len(slots)) for slots in turned]
        self.rebuild(torch.get_default_device())

    def rebuild(self, device: torch.device) -> None:
        """Make the tables anew, on a device."""
        self.register_buffer("slot_of_copy", torch.tensor(self._slots, device=device), persistent=False)
        self.register_buffer("copies", torch.tensor(self._copies, device=device), persistent=False)

    def forward(self, experts: Tensor) -> Tensor:
        if self.training:
            raise ValueError(
                "placement: want a model for inference, since copies of an expert would each learn something else, got one in "
                "training; call eval()"
            )
        turn = torch.arange(experts.shape[0], device=experts.device)[:, None] % self.copies[experts]
        return self.slot_of_copy[experts, turn]
