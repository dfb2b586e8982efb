"""The ops and the passes in a module of one's own: a norm and a gated feed-forward block, compiled by ``build``."""

import torch
from torch import Tensor, nn

import deepfuse as df
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.norm import RMSNorm


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width, 1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


block = Block(64)
for parameter in block.mlp.parameters():
    nn.init.normal_(parameter, std=0.02)

compiled = df.build(block)
x = torch.randn(5, 64)
torch.testing.assert_close(compiled(x), block(x))

for graph in compiled.journal.graphs:
    for entry in graph.passes:
        print(entry.name, entry.rewrites, *entry.notes, sep="\n    ")
print(compiled.journal.graphs[0].snapshots["before:lower"])
