"""A model cut down to what one process of a mesh has of it, and the settings of that."""

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.capacity import Drop
from deepfuse.blocks.expert_parallel import Mode, to_expert_parallel
from deepfuse.blocks.message import Dispatch
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.placement import Placement
from deepfuse.blocks.tensor_parallel import to_tensor_parallel
from deepfuse.ir.link import Link

Overlap = Literal["auto", "none", "shared", "halves"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How tokens reach the experts of other processes."""

    mode: Mode = "dropless"
    """``dropless``: all of them; ``capacity``: of each process, an expert takes a bounded number, and drops the rest;
    ``node_limited``: all of them, over the network once for each node where a token has experts."""
    placement: Placement | str | os.PathLike[str] | None = None
    """In inference: which experts are in which slots of which process, as ``place_experts`` chooses it; or its file."""
    ranks_per_node: int | None = None
    """In mode ``node_limited``: processes of axis ``expert`` on one node, which follow each other there."""
    capacity_factor: float = 1.25
    """That bound, as a multiple of the mean load of an expert."""
    drop: Drop = "affinity"
    """What goes beyond it: the choices of the lowest weight, or by ``position`` those of the last tokens."""
    dispatch: Dispatch = "auto"
    """``fp8``: rows travel to experts as FP8; ``auto``: where the experts would quantize them anyway."""
    overlap: Overlap = "auto"
    """What hides the way of tokens: ``shared``, the shared expert; ``halves`` of the batch, one under the other;
    ``auto``: whichever is predicted to be fastest, chunks among them; ``none``."""
    chunks: int = 1
    """Of a layer's tokens: 2 to 4, so that one travels while experts compute another, however many tokens there are."""
    max_ctas: int | None = 20
    """On CUDA, multiprocessors that a transfer of tokens may take from what runs beside it (NCCL's name); ``None``: NCCL's
    choice. 20 of an H800's 132 are DeepSeek-V3's (arXiv:2412.19437, section 3.2.2)."""
    link: Link | None = None
    """What carries rows, for the cost model that hides their way under other work; ``None``: the usual for the device."""

    def check(self) -> None:
        """What ``build`` does with it, so that one process tells for all.

        Raises:
            ValueError, TypeError: a setting is out of its range.
        """
        for name, of in (("mode", Mode), ("drop", Drop), ("dispatch", Dispatch), ("overlap", Overlap)):
            if getattr(self, name) not in get_args(of):
                raise ValueError(f"parallel: want {name} out of {list(get_args(of))}, got {getattr(self, name)!r}")
        if type(self.chunks) is not int or not 1 <= self.chunks <= 4:
            raise ValueError(f"parallel: want chunks from 1 to 4, got {self.chunks!r}; 1 leaves the tokens together")
        if self.chunks > 1 and self.overlap != "auto":
            raise ValueError(f"parallel: want overlap 'auto' with chunks = {self.chunks}, got {self.overlap!r}")
        of_node = self.ranks_per_node
        if self.mode == "node_limited" and (type(of_node) is not int or of_node < 1):
            raise ValueError(
                f"parallel: want ranks_per_node, an integer >= 1, with mode 'node_limited', got {of_node!r}; it is the number "
                "of processes of axis 'expert' on one machine"
            )
        if self.mode != "node_limited" and of_node is not None:
            raise ValueError(
                f"parallel: want ranks_per_node with mode 'node_limited' alone, got {of_node!r} with {self.mode!r}"
            )
        if not isinstance(self.placement, Placement | str | os.PathLike | None):
            raise TypeError(
                "parallel: want placement as what place_experts returns, or the name of its file, got "
                f"{self.placement!r:.80}"
            )
        if self.max_ctas is not None and (type(self.max_ctas) is not int or self.max_ctas < 1):
            raise ValueError(f"parallel: want max_ctas as an integer >= 1, or None, got {self.max_ctas!r}")
        number = isinstance(self.capacity_factor, int | float) and type(self.capacity_factor) is not bool
        if not number or not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"parallel: want a finite capacity_factor > 0, got {self.capacity_factor!r}")
        if not isinstance(self.link, Link | None):
            raise TypeError(f"parallel: want link as a Link of deepfuse.ir.link, or None, got {self.link!r:.80}")


def to_parallel(
    model: CausalLM,
    parallel: Parallel,
    *,
    tensor: Axis | None,
    expert: Axis | None,
    nodes: tuple[Axis, Axis] | None = None,
) -> None:
    """Cut a model down to one process's part, in place; names of parameters stay. A placement was read from its file.

    Args:
        model: not quantized yet; on any device. On the meta device nothing is computed.
        parallel: how.
        tensor, expert: the axes that share weights; ``None`` for one that the mesh does not have.
        nodes: of ``expert`` in mode ``node_limited``: see :func:`~deepfuse.blocks.expert_parallel.to_expert_parallel`.

    Raises:
        ValueError: the model cannot be dealt out evenly over them.
    """
    placement = parallel.placement
    assert isinstance(placement, Placement | None)
    if expert is not None:
        to_expert_parallel(
            model,
            expert,
            parallel.mode,
            capacity_factor=parallel.capacity_factor,
            drop=parallel.drop,
            dispatch=parallel.dispatch,
            nodes=nodes,
            chunks=parallel.chunks,
            placement=placement,
        )
    if tensor is not None:
        to_tensor_parallel(model, tensor)
