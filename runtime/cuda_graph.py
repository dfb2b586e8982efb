"""A compiled decode step recorded once and replayed: one launch instead of hundreds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepfuse.blocks.model import CausalLM

Graph = Callable[..., Tensor]
"""Of a model, its caches and the inputs of a step."""


class CudaGraph:
    """The recorded step, called like the step."""

    def __init__(self, fn: Graph, args: tuple[Any, ...]):
        self.launched = fn
        """The step itself, kernel by kernel."""
        self.inputs = [a.clone() for a in args[2:]]
        call = (*args[:2], *self.inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up off the default stream, as recording requires
            for _ in range(2):
                fn(*call)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = fn(*call)

    def __call__(self, model: CausalLM, caches: list[Tensor], *inputs: Tensor) -> Tensor:
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given)
        self.graph.replay()
        return self.output.clone()


def kernel_by_kernel(graph: Graph) -> Graph:
    """What a recorded graph replays; any other as it is."""
    return graph.launched if isinstance(graph, CudaGraph) else graph
