"""Providers: the named implementations of an op, and the choice between them.

The choice looks at dtypes, ranks, static sizes and the kind of device, never at values or symbolic sizes, so it is
the same for real and for fake tensors: what the compiler chose is what the eager call would run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REFERENCE = "reference"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Provider:
    """One implementation.

    Attributes:
        name: ``reference``, ``torch``, ``triton``, ... (lower case, unique in its op).
        fn: same signature as the op.
        priority: device type -> priority there; the highest that supports the arguments runs. A device that is not
            named is not served.
        supports: called with the arguments of the op (real or fake tensors); returns ``None``, or why not.
        inline: ``fn`` is plain PyTorch, made to be traced into the compiled graph where Inductor fuses it. An eager
            call never picks an inline provider; a compiled graph calls the others as opaque kernels.
    """

    name: str
    fn: Callable[..., Any]
    priority: Mapping[str, int]
    supports: Callable[..., str | None] = lambda *args: None
    inline: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The provider that runs, and why those before it do not."""

    provider: Provider
    refused: tuple[tuple[str, str], ...]


def choose(
    providers: Sequence[Provider],
    args: Sequence[Any],
    device_type: str,
    *,
    compiled: bool = False,
    forced: str | None = None,
) -> Choice:
    """Pick the provider for these arguments.

    Args:
        providers: of one op; the reference among them.
        args: arguments of the call, real or fake.
        device_type: ``cpu``, ``cuda``, ...
        compiled: whether inline providers may be taken.
        forced: name of the provider to try first, whatever its priority.

    Raises:
        ValueError: no provider is called ``forced``.
    """
    ranked = _ranked(tuple(providers), device_type)
    if forced is not None:
        names = [p.name for p in providers]
        if forced not in names:
            raise ValueError(f"choose: want a provider out of {names}, got {forced!r}")
        ranked = tuple(sorted(ranked, key=lambda p: p.name != forced))
    refused: list[tuple[str, str]] = []
    for provider in ranked:
        if device_type not in provider.priority:
            reason: str | None = f"runs on {', '.join(provider.priority)}, not on {device_type}"
        elif provider.inline and not compiled and provider.name != REFERENCE:
            reason = "is made for compiled graphs only"
        else:
            reason = provider.supports(*args)
        if reason is None:
            return Choice(provider, tuple(refused))
        refused.append((provider.name, reason))
    raise AssertionError(f"the reference refused: {refused}")


@functools.cache
def _ranked(providers: tuple[Provider, ...], device_type: str) -> tuple[Provider, ...]:
    return tuple(sorted(providers, key=lambda p: p.priority.get(device_type, -1), reverse=True))


def float32_at_most(*args: Any) -> str | None:
    """What ``supports`` says of kernels that compute in float32: float64, the dtype of oracles, is left to others."""
    return "computes in float32 at most" if args[0].dtype == torch.float64 else None


def float32_result_at_most(*args: Any) -> str | None:
    """The same, of ops whose last argument is the dtype of the result."""
    return "computes in float32 at most" if args[-1] == torch.float64 else None


def at_most(size: Any, limit: int) -> bool:
    """Whether ``size`` is known at compile time and no larger than ``limit`` (a symbolic size is not known)."""
    return isinstance(size, int) and size <= limit
