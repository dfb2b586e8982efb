"""NVTX ranges of our own: what they are called, their colours, and who takes them.

    graph   decode_1                                     a call of a compiled graph
    block     layers.3.self_attn                         kernels of one block that follow one another
    op          layers.3.self_attn.q_a_proj.linear       one kernel, by the ops it computes

The three are categories of the domain ``deepfuse``, so that Nsight Systems can show one of them alone. The package
``nvtx`` has domains, categories and colours; where it is missing, PyTorch's ranges have the names. Without a tool that
listens, a range costs a call of a function that does nothing.

Source: NVTX 3 (https://nvidia.github.io/NVTX), https://nvtx.readthedocs.io.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from deepfuse.passes.sites import Site
from deepfuse.profiling.timeline import Part

DOMAIN = "deepfuse"
COLORS = {
    "graph": 0xFF607D8B,
    "attention": 0xFF1E88E5,
    "experts": 0xFFFB8C00,
    "mlp": 0xFF43A047,
    "norm": 0xFFFDD835,
    "embedding": 0xFF8E24AA,
    "other": 0xFF00ACC1,
    "several": 0xFF9E9E9E,
}
"""By kind of block, ARGB; a kernel that spans blocks is of the kind ``several``."""
_KINDS = {
    "self_attn": "attention",
    "rotary_emb": "attention",
    "cached_latent": "attention",
    "mlp": "mlp",
    "norm": "norm",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "embed_tokens": "embedding",
    "lm_head": "embedding",
}
_OF_EXPERTS = ("gate", "experts", "shared_experts")
_LONGEST = 120
"""Characters of names that a range lists before it counts the rest: a C++ kernel may be a whole step."""

Category = Literal["graph", "block", "op"]


@dataclass(frozen=True, slots=True)
class Range:
    """What a range says of itself; ``color`` is ARGB."""

    name: str
    color: int
    category: Category


def graph_range(name: str) -> Range:
    return Range(name, COLORS["graph"], "graph")


class Naming:
    """Ranges of the parts of one graph."""

    def __init__(self, sites: Collection[Site]):
        """``sites``: all of the graph; a layer's ``mlp`` has experts if any of them says so."""
        modules = (site.module.split(".") for site in sites)
        self._with_experts = {".".join(m[:3]) for m in modules if len(m) > 3 and m[3] in _OF_EXPERTS}

    def path(self, part: Part) -> list[Range]:
        """From the outside in: the range of the blocks, where the part has any, and that of its ops."""
        blocks = [block for block in part.blocks if block]
        kinds = {self._kind(block) for block in blocks} or {"other"}
        color = COLORS[kinds.pop() if len(blocks) <= 1 else "several"]
        name = listed(part.names) or part.kernel
        others = listed(dict.fromkeys(site.name for site in part.taken_in))
        op = Range(f"{name} with {others}" if others else name, color, "op")
        return [Range(listed(blocks), color, "block"), op] if blocks else [op]

    def _kind(self, block: str) -> str:
        if block in self._with_experts:
            return "experts"
        names = block.split(".")
        if names[0] == "layers":
            # a layer's own sums and norms, where it is not one of its parts
            return _KINDS.get(names[2], "other") if len(names) > 2 else "norm"
        return _KINDS.get(names[0], "other")


def listed(names: Collection[str]) -> str:
    """``a + b``, and ``+ 5 more`` of those that make it longer than a line."""
    shown: list[str] = []
    for name in names:
        if shown and len(" + ".join([*shown, name])) > _LONGEST:
            break
        shown.append(name)
    rest = len(names) - len(shown)
    return " + ".join([*shown, f"{rest} more"] if rest else shown)


class Domain(Protocol):
    """Who takes ranges."""

    def prepared(self, range: Range) -> Any:
        """What ``push`` wants for it."""

    def push(self, prepared: Any) -> Any: ...

    def pop(self) -> Any: ...


class _OfPackage:
    def __init__(self, nvtx: Any):
        self._domain = nvtx.get_domain(DOMAIN)
        self.push, self.pop = self._domain.push_range, self._domain.pop_range

    def prepared(self, range: Range) -> Any:
        return self._domain.get_event_attributes(message=range.name, color=range.color, category=range.category)


class _OfTorch:
    """No domain, no colours: the names alone."""

    push, pop = staticmethod(torch.cuda.nvtx.range_push), staticmethod(torch.cuda.nvtx.range_pop)

    def prepared(self, range: Range) -> Any:
        return range.name


def open_domain() -> Domain:
    """Our domain of the package ``nvtx``, or PyTorch's ranges without one.

    Raises:
        RuntimeError: there is neither.
    """
    try:
        import nvtx
    except ModuleNotFoundError:
        if not torch.backends.cuda.is_built():
            raise RuntimeError(
                "profile: want the package nvtx, or PyTorch with CUDA, for nvtx=True, got neither; "
                'pip install "deepfuse[nvtx]"'
            ) from None
        return _OfTorch()
    return _OfPackage(nvtx)


class Ranges:
    """Ranges of one graph, to open by number and to close."""

    def __init__(self, domain: Domain, graph: str, ranges: Sequence[Range]):
        self._push, self._pop = domain.push, domain.pop
        self._graph = domain.prepared(graph_range(graph))
        self._prepared = [domain.prepared(r) for r in ranges]
        self._open = 0

    def push(self, number: int) -> None:
        self._open += 1
        self._push(self._prepared[number])

    def pop(self) -> None:
        self._open -= 1
        self._pop()

    @contextmanager
    def of_a_call(self) -> Iterator[None]:
        """The range of the graph; at its end, those within that an error has left open are closed as well."""
        self._push(self._graph)
        try:
            yield
        finally:
            while self._open:
                self.pop()
            self._pop()


def nested(paths: Sequence[Sequence[Any]]) -> list[tuple[Sequence[Any], int]]:
    """Of each thing in a row, which ranges open before it and how many close behind it, from its path of ranges.

    What two neighbours share stays open between them.
    """
    found = []
    for before, path, after in zip([(), *paths], paths, [*paths[1:], ()], strict=False):
        found.append((path[_shared(before, path) :], len(path) - _shared(path, after)))
    return found


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
