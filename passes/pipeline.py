"""The passes in order, and how a set of them is changed.

Stages and the graphs they see (hooks of Inductor, set for one compilation only):
    semantic, quantize   the joint graph, before anything else; functional, views still there
    communicate          forward and backward each, after the partition
    lower                last: what remains of the dialect goes to providers
"""

import difflib
import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace

import deepfuse.ir.op
import deepfuse.ir.provider
from deepfuse.passes import fusion, match, splice
from deepfuse.passes.absorb_mla import absorb_mla
from deepfuse.passes.lower import lower
from deepfuse.passes.record import STAGES, Pass

DEFAULT: tuple[Pass, ...] = (
    absorb_mla,  # decode attends in latent space
    lower,  # each remaining op to the provider for its device
)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """An ordered set of passes. Immutable; the methods return changed copies."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.passes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"pipeline: want passes of different names, got {name!r} twice")
        order = [STAGES.index(p.stage) for p in self.passes]
        if order != sorted(order):
            raise ValueError(
                f"pipeline: want stages in the order {STAGES}, got {[(p.name, p.stage) for p in self.passes]}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.passes)

    def without(self, *names: str) -> "Pipeline":
        """All passes but these.

        Raises:
            ValueError: there is no pass of that name; the nearest names are given.
        """
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.4) or self.names
                raise ValueError(f"passes: want a name out of {', '.join(near)}, got {name!r}")
        return replace(self, passes=tuple(p for p in self.passes if p.name not in names))

    def plus(self, *passes: Pass) -> "Pipeline":
        """These as well, each as the last of its stage."""
        ordered: Iterable[Pass] = (*self.passes, *passes)
        return replace(self, passes=tuple(sorted(ordered, key=lambda p: STAGES.index(p.stage))))

    def of_stages(self, *stages: str) -> tuple[Pass, ...]:
        return tuple(p for p in self.passes if p.stage in stages)

    def key(self, settings: object) -> str:
        """Of the passes' sources, their order, the settings, and the choice of providers: for compile caches."""
        parts = [f"{p.name}:{p.stage}:{p.source_hash()}" for p in self.passes]
        machinery = (deepfuse.ir.provider, deepfuse.ir.op, fusion, match, splice)
        parts += [*(inspect.getsource(module) for module in machinery), repr(settings)]
        for op in deepfuse.ir.op.OPS.values():
            parts.append(inspect.getsource(inspect.getmodule(op.reference) or op.reference))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def default() -> Pipeline:
    """The passes ``build`` runs."""
    return Pipeline(DEFAULT)
