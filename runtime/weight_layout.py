"""Weights that are read together lie together, so that one product can read them as one matrix.

A block names its weights of one input in ``side_by_side``; these, and the scales of FP8 weights, are laid one behind the
other in one storage. What it names in ``one_more_expert`` is laid so where asked for: a shared expert's matrices behind
the stacks of the routed ones, each of which they continue by one. Each weight stays a parameter of its own: saved
and loaded by its name, and written in place. What is moved to another device or dtype before it is built lies by itself
again, and is read by itself; of a built model weights may be written, but not moved, since its graphs read them where
they lay.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from deepfuse.ir.private import storage_id
from deepfuse.runtime.weight_names import SCALE


def groups(model: nn.Module, *, with_experts: bool) -> Iterator[list[str]]:
    """Names of the parameters that are to lie one behind the other, group by group.

    Args:
        model: on any device, the meta device as well.
        with_experts: whether a shared expert lies behind the routed ones; else its matrices of one input do by themselves.
    """
    parameters = dict(model.named_parameters())
    taken: set[str] = set()
    for prefix, module in model.named_modules():
        behind = list(_found(prefix, getattr(module, "one_more_expert", ()), parameters)) if with_experts else []
        if not all(_is_one_more([parameters[name] for name in group]) for group in behind):
            behind = []
        for group in (*behind, *_found(prefix, getattr(module, "side_by_side", ()), parameters)):
            kinds = {(p.dtype, p.device, p.shape[-1]) for p in map(parameters.__getitem__, group)}
            if len(kinds) == 1 and taken.isdisjoint(group):
                taken.update(group)
                yield group


def _found(prefix: str, named: Sequence[Sequence[str]], parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Those of the named groups that a model has all of, and those of their scales."""
    for names in named:
        for suffix in ("", SCALE):
            group = [f"{prefix}.{name}{suffix}".lstrip(".") for name in names]
            if all(name in parameters for name in group):
                yield group


def _is_one_more(parameters: list[Tensor]) -> bool:
    """Whether matrices have together the shape of one of the stack before them, and its dtype and place."""
    stack, *matrices = parameters
    kinds = {(p.dtype, p.device, p.shape[-1]) for p in parameters}
    return len(kinds) == 1 and sum(len(m) for m in matrices) == stack.shape[1]


def parts(shapes: Sequence[torch.Size], empty: Callable[[tuple[int, int]], Tensor]) -> list[Tensor]:
    """Tensors of these shapes, one behind the other in a matrix that ``empty`` makes."""
    rows = [shape[:-1].numel() for shape in shapes]
    whole = empty((sum(rows), shapes[0][-1]))
    return [part.view(shape) for part, shape in zip(whole.split(rows), shapes, strict=True)]


@torch.no_grad()
def lay_side_by_side(model: nn.Module, *, with_experts: bool) -> None:
    """Move the weights of :func:`groups` together; beyond them it takes the memory of one such group.

    What lies so already stays where it is: ``load_weights`` makes room for a whole group at once.
    """
    parameters = dict(model.named_parameters())
    for names in groups(model, with_experts=with_experts):
        group = [parameters[name] for name in names]
        if not _lie_side_by_side(group):
            first = group[0]
            laid = parts([p.shape for p in group], lambda s, p=first: torch.empty(s, dtype=p.dtype, device=p.device))  # type: ignore[misc]
            for parameter, part in zip(group, laid, strict=True):
                parameter.data = part.copy_(parameter)


def _lie_side_by_side(group: list[nn.Parameter]) -> bool:
    if len({storage_id(p) for p in group}) > 1:
        return False
    end = 0
    for p in group:
        if p.storage_offset() != end or not p.is_contiguous():
            return False
        end += p.numel()
    return True


def layout_key(model: nn.Module) -> str:
    """Which parameters share memory, and where in it they lie; empty where none do.

    Graphs that read one parameter through another are right for models of one such key only.
    """
    together: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        together[storage_id(parameter)].append((name, parameter))
    shared = [[(name, p.storage_offset()) for name, p in group] for group in together.values() if len(group) > 1]
    return hashlib.sha256(repr(shared).encode()).hexdigest() if shared else ""
