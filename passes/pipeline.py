"""The passes in order, and how a set of them is changed.

Stages and the graphs they see (hooks of Inductor, set for one compilation only):
    semantic, quantize   the joint graph, before anything else; functional, views still there
    communicate          forward and backward each, after the partition
    lower                last: what remains of the dialect goes to providers
"""

import difflib
import hashlib
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import deepfuse.ir.op
import deepfuse.ops
import deepfuse.passes
from deepfuse.passes.absorb_mla import absorb_mla
from deepfuse.passes.eliminate_no_ops import eliminate_no_ops
from deepfuse.passes.fuse_decode_attention import fuse_decode_attention
from deepfuse.passes.fuse_norm_quantize import FuseNormQuantize
from deepfuse.passes.fuse_permute_quantize import FusePermuteQuantize
from deepfuse.passes.fuse_quantized_experts import FuseQuantizedExperts
from deepfuse.passes.fuse_quantized_matmul import FuseQuantizedMatmul
from deepfuse.passes.fuse_quantized_wgrad import FuseQuantizedWgrad
from deepfuse.passes.fuse_rope_append import fuse_rope_append
from deepfuse.passes.fuse_router_logits import FuseRouterLogits
from deepfuse.passes.fuse_swiglu_quantize import FuseSwigluQuantize
from deepfuse.passes.lower import lower
from deepfuse.passes.merge_projections import merge_projections
from deepfuse.passes.merge_shared_expert import merge_shared_expert
from deepfuse.passes.overlap_all_to_all import overlap_all_to_all
from deepfuse.passes.recognize_linear import RecognizeLinear
from deepfuse.passes.recognize_norm import RecognizeNorm
from deepfuse.passes.recognize_rotary import RecognizeRotary
from deepfuse.passes.recognize_swiglu import RecognizeSwiglu
from deepfuse.passes.record import STAGES, Pass
from deepfuse.passes.share_quantize import share_quantize

DEFAULT: tuple[Any, ...] = (  # of passes; mypy takes a decorated class for a class
    eliminate_no_ops,  # what gives back its operand
    RecognizeNorm,  # what other people's models are made of becomes our ops
    RecognizeSwiglu,
    RecognizeRotary,
    RecognizeLinear,
    FuseRouterLogits,  # narrow operands of a float32 product stay narrow
    absorb_mla,  # decode attends in latent space
    merge_shared_expert,  # the shared expert is expert E, one more of those routed to
    merge_projections,  # one product for the weights that lie side by side
    share_quantize,  # an activation is quantized once, however many layers read it
    FuseNormQuantize,  # and by the kernel that computes it
    FuseSwigluQuantize,
    FusePermuteQuantize,
    fuse_decode_attention,  # and so the absorbed attention, with what stands around it
    FuseQuantizedMatmul,  # products take the FP8 numbers as they are
    FuseQuantizedExperts,
    FuseQuantizedWgrad,
    fuse_rope_append,  # norm, rotation and cache write in one kernel
    overlap_all_to_all,  # tokens travel while something else is computed
    lower,  # each remaining op to the provider for its device
)

GROUP = "deepfuse.passes"
"""Entry points of packages that bring passes."""


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
                near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.6) or self.names
                raise ValueError(f"passes: want a name out of {', '.join(near)}, got {name!r}")
        return replace(self, passes=tuple(p for p in self.passes if p.name not in names))

    def plus(self, *passes: Pass) -> "Pipeline":
        """These as well, each as the last of its stage."""
        ordered: Iterable[Pass] = (*self.passes, *passes)
        return replace(self, passes=tuple(sorted(ordered, key=lambda p: STAGES.index(p.stage))))

    def of_stages(self, *stages: str) -> tuple[Pass, ...]:
        return tuple(p for p in self.passes if p.stage in stages)

    def key(self, settings: object) -> str:
        """Of all sources of ``ir``, passes and ops, the passes' order and the settings: for compile caches."""
        parts = [f"{p.name}:{p.stage}:{p.source_hash()}" for p in self.passes]
        # helpers of passes and ops, costs and the choice of providers among them
        for package in (deepfuse.ir, deepfuse.ops, deepfuse.passes):
            parts += [path.read_text() for path in sorted(Path(package.__path__[0]).glob("*.py"))]
        parts.append(repr(settings))
        # of ops defined elsewhere, too; ours stand in the table in the order, and as far as, they were imported
        for _, op in sorted(deepfuse.ir.op.OPS.items()):
            if not op.reference.__module__.startswith(f"{deepfuse.ops.__name__}."):
                parts.append(inspect.getsource(inspect.getmodule(op.reference) or op.reference))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def default() -> Pipeline:
    """The passes ``build`` runs: ours and those of installed packages, without those that ``DEEPFUSE_WITHOUT`` names.

    Raises:
        ValueError, TypeError: a package's pass cannot be used, or there is no pass of a name in ``DEEPFUSE_WITHOUT``.
    """
    pipeline = Pipeline(DEFAULT).plus(*from_packages())
    return pipeline.without(*(n.strip() for n in os.environ.get("DEEPFUSE_WITHOUT", "").split(",") if n.strip()))


def from_packages() -> list[Pass]:
    """Passes of the entry points in the group ``deepfuse.passes``, in the order of their names.

    Raises:
        TypeError: an entry point is no pass.
    """
    passes = []
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            loaded = entry.load()
        except Exception as error:
            raise TypeError(
                f"passes: want a pass at the entry point {entry.name} = {entry.value}, got {error}"
            ) from error
        if not isinstance(loaded, Pass):
            raise TypeError(f"passes: want a pass at the entry point {entry.name} = {entry.value}, got {loaded!r}")
        passes.append(loaded)
    return passes


def pipeline_of(passes: Pipeline | Pass | Iterable[Pass] | None) -> Pipeline:
    """A pipeline from what ``build`` takes: one, passes to add to the default, or nothing.

    Raises:
        TypeError: something else.
    """
    if passes is None or isinstance(passes, Pipeline):
        return passes or default()
    listed = [passes] if isinstance(passes, Pass) else list(passes) if isinstance(passes, Iterable) else [passes]
    if not listed:
        raise TypeError(f"passes: want a pipeline or passes to add to the default, got {passes!r}; none: Pipeline(())")
    for p in listed:
        if not isinstance(p, Pass):
            raise TypeError(f"passes: want a pipeline or passes (@fusion, @graph_pass), got {p!r}")
    return default().plus(*listed)
