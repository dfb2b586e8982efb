"""Experts on several processes, and every token goes to all that it chose, however many come to one of them.

    counts    rows for each expert, to its process: one small all-to-all, which waits for the routing only
    dispatch  rows sorted by expert, to the experts' processes, of which each has E / R in order
    experts   rows sorted anew, by expert and then by process
    combine   their results, the way back; the token's own process takes the weighted sum

How many rows come is known when the counts are: sizes are symbols that the data decide, and the graph stays one.
An expert's rows lie in the order of the processes and, of each, of its tokens: as in one process that has the tokens of
all. So no number differs from that process's, but for sums over tokens of different processes.
Dims: T tokens, D model width, E experts, K experts per token, R processes, L = E / R experts of a process, n rows.
Source: dropless dispatch, Gale et al. 2022 (arXiv:2211.15841), section 5; expert parallelism, Lepikhin et al. 2020
(arXiv:2006.16668), section 3.2.
"""

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.message import Dispatch, Message
from deepfuse.ops.expert_unpermute import expert_unpermute


class Dropless(nn.Module):
    """All tokens reach all their experts."""

    def __init__(self, num_experts: int, axis: Axis, *, dispatch: Dispatch = "auto"):
        super().__init__()
        axis.share(num_experts, "n_routed_experts")
        self.num_experts, self.axis, self.dispatch = num_experts, axis, dispatch

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, ffn: nn.Module) -> tuple[Tensor, Tensor]:
        """As :class:`~deepfuse.blocks.exchange.Local`'s; ``ffn`` has the experts of this process's share."""
        load = count(experts, self.num_experts)
        sizes = Sizes(load, self.axis)
        message = Message.of(x, self.dispatch, ffn)
        rows, order, inverse, _ = message.permuted(experts, self.num_experts)
        return expert_unpermute(there_and_back(rows, sizes, ffn, self.axis), order, inverse, weights), load


class Sizes:
    """Who sends how many rows to whom, as far as this process needs to know.

    Attributes:
        come: ``[R * L]`` int64, rows from each process for each expert here.
        sent, received: rows to and from each process.
    """

    def __init__(self, load: Tensor, axis: Axis):
        """``load [E]`` int64, rows of this process for each expert."""
        R, L = axis.size, load.shape[0] // axis.size
        self.come = all_to_all(load, [L] * R, [L] * R, axis)
        # to the host at once: one synchronisation
        sizes = torch.cat((load, self.come)).view(2 * R, L).sum(1).cpu().tolist()
        for size in sizes:
            torch._check(size >= 0)
        self.sent, self.received = sizes[:R], sizes[R:]


def count(experts: Tensor, num_experts: int) -> Tensor:
    """``[E]`` int64: how often each expert stands in ``experts``; not after :func:`expert_permute`, which moves rows."""
    chosen = experts.flatten()
    return chosen.new_zeros(num_experts).scatter_add(0, chosen, torch.ones_like(chosen))


def there_and_back(rows: Message, sizes: Sizes, ffn: nn.Module, axis: Axis) -> Tensor:
    """``rows``, sorted by expert, through experts that lie on the processes of ``axis``."""
    there = rows.sent(sizes.received, sizes.sent, axis)
    L = sizes.come.shape[0] // axis.size
    of_source = torch.arange(L, device=sizes.come.device).repeat(axis.size)
    expert = torch.repeat_interleave(of_source, sizes.come, output_size=sum(sizes.received))
    there, order, inverse, offsets = there.permuted(expert[:, None], L)
    x, quantized = there.opened()
    # an unpermute with weights of 1 moves rows only, and so does its gradient
    ones = torch.ones_like(expert[:, None], dtype=torch.float32)
    y = expert_unpermute(ffn(x, offsets, quantized), order, inverse, ones)
    return all_to_all(y, sizes.sent, sizes.received, axis)
