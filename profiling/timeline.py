"""What a profile measured: steps of graphs, and in each the spans of kernels. Times are nanoseconds of one clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deepfuse.ir.private import COLLECTIVES
from deepfuse.passes.sites import Site


@dataclass(frozen=True, slots=True)
class Span:
    """One part of one kernel, once.

    Attributes:
        kernel: its number in the graph's code.
        part: of the kernel.
    """

    kernel: int
    part: int
    began: int
    ended: int


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a graph.

    Attributes:
        graph: ``prefill``, ``decode_1``, ...
        began, ended: of the whole call.
        code_began, code_ended: of Inductor's code in it; before and after run the guards and PyTorch's runtime.
        sizes: free size of the graph -> its value in this call.
    """

    graph: str
    began: int
    ended: int
    code_began: int
    code_ended: int
    spans: list[Span] = field(repr=False)
    sizes: Mapping[str, int]

    @property
    def wrapper_ns(self) -> int:
        """In Inductor's Python between kernels: allocations, views, and launching."""
        return self.code_ended - self.code_began - sum(s.ended - s.began for s in self.spans)

    @property
    def guard_ns(self) -> int:
        """Around Inductor's code."""
        return self.ended - self.began - (self.code_ended - self.code_began)


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a kernel computes.

    Attributes:
        kernel: name in the code.
        own: sites whose results it writes.
        taken_in: sites it computes on the way, or again.
    """

    kernel: str
    own: tuple[Site, ...]
    taken_in: tuple[Site, ...]

    @property
    def attributed(self) -> bool:
        """Whether module and op of its results are known."""
        return bool(self.own) and all(site.module for site in self.own)

    @property
    def communicates(self) -> bool:
        """Whether it starts a collective or waits for one; a loop that copies for one does not."""
        return f"{COLLECTIVES}." in self.kernel

    @property
    def names(self) -> tuple[str, ...]:
        """Of its own sites, each once, in the order of the graph."""
        return tuple(dict.fromkeys(site.name for site in self.own))

    @property
    def name(self) -> str:
        return " + ".join(self.names) or self.kernel

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks of the model it computes for: several where a kernel spans them."""
        return tuple(dict.fromkeys(block_of(site.module) for site in self.own)) or ("",)


def block_of(module: str) -> str:
    """``layers.3.self_attn`` of ``layers.3.self_attn.q_a_proj``; outside of the layers, the first two names."""
    names = module.split(".")
    return ".".join(names[:3] if names[0] == "layers" else names[:2])
