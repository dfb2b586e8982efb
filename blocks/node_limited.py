"""Experts on nodes of several processes, and a token travels at most once to each node, however many it chose there.

    across    a token to each node that has experts of its: to the process with the sender's place in that node
    within    from there to its experts' processes, and their results back: weighted and summed, one row a token
    across    these sums back; the token's own process adds up those of the nodes

The network between nodes carries at most ``topk_group`` copies of a token where each node has whole groups of experts
(``n_group / N`` of them), instead of K; the faster links within a node do the rest. Processes are counted node by node:
process ``n * P + p`` is the p-th of node n, and experts lie as without nodes.
Weighted sums are taken per node and then over the nodes, so in another order than in one process, and a node's sum is
rounded to the dtype of the rows once more; all else is as in ``dropless.py``.
Dims: T tokens, D model width, E experts, K experts per token, N nodes of P processes, S rows that came to this node.
Source: DeepSeek-V3 (arXiv:2412.19437), sections 2.1.2 (node-limited routing) and 3.2.2 (network, then NVLink).
"""

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.dropless import Sizes, count, there_and_back
from deepfuse.blocks.message import Dispatch, Message
from deepfuse.blocks.slots import from_slots, sources, to_slots


class NodeLimited(nn.Module):
    """All tokens reach all their experts, over the network once for each node."""

    def __init__(self, num_experts: int, across: Axis, within: Axis, *, dispatch: Dispatch = "auto"):
        """``across``: the processes of this one's place in each node; ``within``: those of its node."""
        super().__init__()
        across.share(num_experts, "n_routed_experts")
        within.share(num_experts // across.size, "a node's n_routed_experts")
        self.num_experts, self.across, self.within, self.dispatch = num_experts, across, within, dispatch

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, ffn: nn.Module) -> tuple[Tensor, Tensor]:
        """As :class:`~deepfuse.blocks.exchange.Local`'s; ``ffn`` has the experts of this process's share."""
        N, of_node = self.across.size, self.num_experts // self.across.size
        load = count(experts, self.num_experts)
        # a token's nodes are its choices now: [T, N], 1 where it goes
        nodes = torch.arange(N, device=experts.device)
        goes = ((experts // of_node)[..., None] == nodes).any(1).to(torch.int64)
        sizes = Sizes(goes.sum(0), self.across)
        slot, source = _in_order(goes, sum(sizes.sent))
        message = Message.of(x, self.dispatch, ffn).in_slots(source, slot)
        message = message.sent(sizes.received, sizes.sent, self.across)
        # what each token chose goes with it, of which a node reads its own
        chosen, weight = (
            all_to_all(to_slots(of_token, source, slot), sizes.received, sizes.sent, self.across)
            for of_token in (experts, weights)
        )
        y = self._within(message, weight, chosen, of_node, ffn)
        y = all_to_all(y, sizes.sent, sizes.received, self.across)
        return from_slots(y, source, slot, goes.to(torch.float32)), load

    def _within(self, message: Message, weights: Tensor, chosen: Tensor, of_node: int, ffn: nn.Module) -> Tensor:
        """``[S, D]``: sums over the experts of this node, ``of_node`` of them, for ``chosen [S, K]`` out of all."""
        # not less its first: a subtraction of 0 would leave another graph, and other costs, to the first node
        here = chosen // of_node == self.across.rank
        expert = torch.where(here, chosen % of_node, of_node).flatten()
        load = count(expert, of_node + 1)[:-1]
        sizes = Sizes(load, self.within)
        # those of other nodes behind all others, and cut off
        order = expert.argsort(stable=True)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        slot = torch.where(here, rank.view_as(chosen), -1)
        source = order.narrow(0, 0, sum(sizes.sent))
        y = there_and_back(message.in_slots(source, slot), sizes, ffn, self.within)
        return from_slots(y, source, slot, weights)


def _in_order(goes: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Slot of each 1 of ``goes [T, N]``, by node and then by token, and -1 for each 0; what is in the ``rows`` slots."""
    by_node = goes.t().flatten()
    slot = torch.where(by_node == 1, by_node.cumsum(0) - 1, -1).view(goes.shape[1], -1).t()
    return slot, sources(slot, rows)
