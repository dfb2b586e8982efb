"""What a rule declares: its patterns with what replaces them, and what of a declaration is refused."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepfuse.ir.op import NAMESPACE
from deepfuse.passes.match import op_name
from deepfuse.passes.samples import materialized

_NAMES = """
add radd iadd sub rsub mul rmul div truediv rtruediv neg clone contiguous copy to to_copy type float half bfloat16 double
convert_element_type get getitem view reshape flatten unflatten permute transpose t swapaxes movedim expand expand_as
unsqueeze squeeze narrow select slice split chunk unbind size shape
"""
COMMON = frozenset(_NAMES.split())
"""What stands everywhere: no search begins there. Names of ops, and of the functions that call them."""


@dataclass(frozen=True, slots=True)
class Case:
    """A pattern, what replaces it, what both are proved on, and the names of the ops of ours in the pattern."""

    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    samples: tuple[tuple[Any, ...], ...]
    ops: frozenset[str] = frozenset()

    @property
    def parameters(self) -> list[str]:
        return list(inspect.signature(self.pattern).parameters)


def cases_of(declared: type, name: str, anchor: Any, free: Sequence[str]) -> tuple[Case, ...]:
    """All patterns of a declaration; see :mod:`deepfuse.passes.fusion`.

    Args:
        name: of the rule.
        anchor: the op a search begins at, or ``None``.
        free: the parameters that are ints of any value.

    Raises:
        ValueError: see :func:`deepfuse.passes.fusion.fusion`.
    """
    members = vars(declared)
    for wanted in ("pattern", "replacement", "samples"):
        if not members.get(wanted):
            raise ValueError(f"{name}: want a class with pattern, replacement and samples, got no {wanted}")
    for what, _, suffix in (member.partition("_") for member in members if re.match("(replacement|samples)_", member)):
        if f"pattern_{suffix}" not in members:
            raise ValueError(f"{name}: want pattern_{suffix} for {what}_{suffix}, got none")
    cases = []
    for suffix in (member.removeprefix("pattern") for member in members if re.fullmatch("pattern(_.*)?", member)):
        replacement, samples = (
            getattr(declared, what + suffix, getattr(declared, what)) for what in ("replacement", "samples")
        )
        case = Case(getattr(declared, "pattern" + suffix), replacement, tuple(samples))
        checked = samples[:1] if declared.__module__.startswith(__package__ + ".") else samples
        cases.append(replace(case, ops=_check(name, anchor, free, case, checked)))
    return tuple(cases)


def no_anchor(name: str, anchor: Any, ops: list[str]) -> ValueError:
    """The error of a pattern that a search could begin at no op of."""
    wanted = "an op rarer than these" if anchor is None else op_name(anchor)
    return ValueError(f"{name}: want a pattern with an anchor to search for, {wanted}, got the ops {ops}")


def _check(
    name: str, anchor: Any, free: Sequence[str], case: Case, checked: Sequence[tuple[Any, ...]]
) -> frozenset[str]:
    """What a registration refuses; on real zeros: torch imports for seconds before its first meta tensor.

    Args:
        checked: the samples whose shapes and dtypes are compared. Of our own rules, which every process imports, it is
            the first, and all in their test.

    Returns:
        The names of the ops of ours in the pattern.
    """
    fn = case.replacement
    if list(inspect.signature(fn).parameters) != case.parameters:
        raise ValueError(
            f"{name}: want {fn.__name__} with the parameters {case.parameters} of {case.pattern.__name__}, "
            f"got {list(inspect.signature(fn).parameters)}"
        )
    for sample in case.samples:
        if len(sample) != len(case.parameters):
            raise ValueError(f"{name}: want samples of {case.parameters}, got {sample}")
    ours: set[str] = set()
    for sample in checked:
        arguments = materialized(sample, zeros=True)
        for parameter in set(free) & set(case.parameters):
            if type(value := arguments[case.parameters.index(parameter)]) is not int:
                raise ValueError(f"{name}: want free parameters that are ints, got {parameter} = {value}")
        want = _shapes(case.replacement(*arguments))
        with _Recorded() as seen:
            got = _shapes(case.pattern(*arguments))
        if anchor is None and seen.names <= COMMON:
            raise no_anchor(name, anchor, sorted(seen.names - {"get"}))
        if got != want:
            raise ValueError(
                f"{name}: want a replacement that gives what the {case.pattern.__name__} gives, {got}, got "
                f"{want}, for {sample}"
            )
        ours |= seen.ours
    return frozenset(ours)


class _Recorded(TorchFunctionMode):
    """Names of the functions called. A dispatch mode would see ops, but imports Dynamo for that."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.ours: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0].strip("_"))
        if isinstance(func, torch._ops.OpOverload) and func.namespace == NAMESPACE:
            self.ours.add(func._opname)
        return func(*args, **(kwargs or {}))


def _shapes(result: Any) -> list[str]:
    results = result if isinstance(result, list | tuple) else (result,)
    return [f"{str(r.dtype).removeprefix('torch.')}{list(r.shape)}" for r in results]
