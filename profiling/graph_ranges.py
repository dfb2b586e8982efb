"""NVTX ranges around the nodes of a graph that runs uncompiled, as the passes left it.

What a compiled graph does in kernels, this one does node by node: those of one op that follow one another have one range,
and a block's range stands around those of its ops. Views and numbers have none.
"""

import json
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree

from deepfuse.ir.private import SITE_TEXT
from deepfuse.passes.sites import Site
from deepfuse.profiling.called_frames import called_frames
from deepfuse.profiling.nvtx import Domain, Naming, Range, Ranges, nested
from deepfuse.profiling.timeline import Part
from deepfuse.profiling.view_ops import is_view


class RangedGraph(fx.Interpreter):
    """Runs the nodes of a graph, and opens and closes ranges between them."""

    def __init__(self, gm: fx.GraphModule, domain: Domain, name: str):
        """``gm``: whose nodes have sites; ``name``: of the graph."""
        super().__init__(gm)
        sites = {node: Site(**json.loads(node.meta[SITE_TEXT])) for node in gm.graph.nodes if SITE_TEXT in node.meta}
        naming = Naming(sites.values())
        nodes = [node for node in sites if _computes(node)]
        paths = []
        for node in nodes:
            site = sites[node]
            *blocks, op = naming.path(Part(str(node.target), (site,), ()))
            paths.append([(block, -1) for block in blocks] + [(op, site.number)])
        ranges: list[Range] = []
        self.opened: dict[fx.Node, list[int]] = {}
        self.closed: dict[fx.Node, int] = {}
        for node, (opened, self.closed[node]) in zip(nodes, nested(paths), strict=True):
            self.opened[node] = [len(ranges) + i for i in range(len(opened))]
            ranges += [r for r, _ in opened]
        self.ranges = Ranges(domain, name, ranges)

    def run_node(self, n: fx.Node) -> Any:
        for number in self.opened.get(n, ()):
            self.ranges.push(number)
        result = super().run_node(n)
        for _ in range(self.closed.get(n, 0)):
            self.ranges.pop()
        return result

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, who calls the graph's module calls this."""
        self.module.forward = self.run  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self.module.forward


def graph_called_by(fn: Callable[[], Any]) -> tuple[fx.GraphModule, Any]:
    """The graph with sites whose nodes the function runs, the last where there are several; and what ``fn`` returns.

    Raises:
        ValueError: it runs none, or it has ranges already.
    """

    def look(frame: types.FrameType) -> fx.GraphModule | None:
        if frame.f_code.co_name not in ("forward", "run"):
            return None
        owner: Any = frame.f_locals.get("self")
        gm: Any = owner.module if isinstance(owner, RangedGraph) else owner
        ours = isinstance(gm, fx.GraphModule) and any(SITE_TEXT in node.meta for node in gm.graph.nodes)
        return gm if ours else None

    found, result = called_frames(fn, look)
    if not found:
        raise ValueError("profile: want a model whose graphs the passes went through, got one that calls no such graph")
    if "forward" in vars(found[-1]):
        raise ValueError("profile: want one profile at a time, got one of a model that is being profiled")
    return found[-1], result


def _computes(node: fx.Node) -> bool:
    leaves = _pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, Tensor) for v in leaves) and not is_view(node.target)
