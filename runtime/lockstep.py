"""Processes that exchange tokens run the same graphs, one after the other, though each has prompts of its own.

A call of the model is one for all processes of axis ``expert``: each must take part in the exchanges of every layer.
So before a call they agree on which it is (prefill goes first, and the largest batch), and a process with nothing to do
takes part in it with padding, until no process has anything left.

    process 0   prefill  decode 2  decode 2  (padding)
    process 1   prefill  decode 2  decode 1  decode 1

It costs one reduction of two numbers a call, and nothing without that axis.
"""

import zlib
from dataclasses import dataclass

import torch

from deepfuse.blocks.collectives import largest_over
from deepfuse.runtime.axes import Axes


@dataclass(frozen=True, slots=True)
class Lockstep:
    """What processes agree on before each call."""

    axes: Axes
    device: torch.device
    equal: bool = False
    """Whether a call wants as many tokens on every process."""

    def agree(self, tokens: int, bucket: int) -> tuple[int, int]:
        """The largest number of tokens to prefill, and bucket to decode, of any process; 0 and 0 where all are done."""
        if self.axes.expert is None:
            return tokens, bucket
        asked = torch.tensor([tokens, bucket], device=self.device)
        most_tokens, largest = largest_over(asked, self.axes.expert).tolist()
        return most_tokens, largest

    def check_same(self, what: str, value: object) -> None:
        """Compare what the processes of axis ``tensor``, which share each token's work, were given.

        Raises:
            ValueError: on each of them, where it is not the same.
        """
        axis = self.axes.tensor
        if axis is None:
            return
        digest = zlib.crc32(repr(value).encode())
        largest, least = largest_over(torch.tensor([digest, -digest], device=self.device), axis).tolist()
        if largest != -least:
            raise ValueError(
                f"{what}: want the same on the {axis.size} processes of axis {axis.name!r}, which share each token's work, "
                "got others on some of them"
            )
