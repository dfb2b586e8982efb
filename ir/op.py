"""The record an op is made of, and the table of all ops.

An op is its reference: a plain PyTorch function that defines shapes, dtypes and values. Everything else (kernels,
shape rule, gradient, cost) is an implementation that must agree with it. Ops register through ``torch.library``'s
low-level ``Library.define``, whose call costs a third of ``custom_op``'s.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from deepfuse.ir.cost import Cost
from deepfuse.ir.private import schema_parameters
from deepfuse.ir.provider import REFERENCE, Choice, Provider, choose
from deepfuse.ir.tolerance import DEFAULT_TOLERANCE, Tolerance

NAMESPACE = "deepfuse"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, "Op"] = {}

Samples = Callable[[torch.device, torch.dtype], Iterable[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Op:
    """One operator of the dialect; calling it calls ``torch.ops.deepfuse.<name>``.

    Attributes:
        name: unqualified, as in ``torch.ops.deepfuse.<name>``.
        signature: the part of the schema behind the name.
        reference: defines the op. Computes in float64 when given float64 (then it is the oracle of the tests).
        check: raises for arguments the op does not take; called by every provider and by the shape rule.
        fake: shape rule: empty outputs of the right shape, dtype and (contiguous) strides.
        cost: FLOPs and bytes from the arguments.
        samples: argument tuples for tests and benchmarks, on a device and in a dtype.
        differentiable: whether a gradient is registered.
        functional: of an op that mutates: what it returns and then what it leaves in the arguments it changes, as new
            tensors. So it stands in a functional graph where no kernel does it; ``None`` keeps the call.
        tolerance: per-dtype bounds where the defaults do not fit, each with its reason in the op's file.
        providers: the reference and the others.
    """

    name: str
    signature: str
    reference: Callable[..., Any]
    check: Callable[..., None]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    samples: Samples
    differentiable: bool
    functional: Callable[..., Any] | None = None
    tolerance: Mapping[torch.dtype, Tolerance] = field(default_factory=dict)
    providers: list[Provider] = field(default_factory=list)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.deepfuse, self.name).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    @property
    def schema(self) -> str:
        return f"{NAMESPACE}::{self.name}{self.signature}"

    @property
    def mutates(self) -> bool:
        return "!" in self.signature

    def tolerance_for(self, dtype: torch.dtype) -> Tolerance:
        return self.tolerance[dtype] if dtype in self.tolerance else DEFAULT_TOLERANCE[dtype]

    def choose(self, args: tuple[Any, ...], *, compiled: bool = False, forced: str | None = None) -> Choice:
        return choose(self.providers, args, device_type(args), compiled=compiled, forced=forced)

    def provide(
        self,
        name: str,
        fn: Callable[..., Any],
        *,
        priority: Mapping[str, int],
        supports: Callable[..., str | None] = lambda *args: None,
        inline: bool = False,
    ) -> None:
        """Add an implementation; see :class:`~deepfuse.ir.provider.Provider`.

        Besides the default overload, which chooses at each call, every opaque provider has an overload of its own
        (``torch.ops.deepfuse.rms_norm.triton``): lowered graphs name what they run.
        """
        if any(p.name == name for p in self.providers):
            raise ValueError(f"{self.name}: want provider names that differ, got {name!r} twice")
        self.providers.append(Provider(name=name, fn=fn, priority=priority, supports=supports, inline=inline))
        if inline and name != REFERENCE:
            return

        def run(*args: Any) -> Any:
            self.check(*args)
            return fn(*args)

        LIBRARY.define(f"{self.name}.{name}{self.signature}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(f"{self.name}.{name}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}.{name}", self.fake, lib=LIBRARY)
        self._register_flops()

    def _register_flops(self) -> None:
        packet = getattr(torch.ops.deepfuse, self.name)
        # torch's registry is keyed by packet, and a packet's hash changes when it gets an overload: what stands under an
        # earlier hash would be found or not by chance
        others = [(key, formula) for key, formula in flop_registry.items() if key is not packet]
        flop_registry.clear()
        flop_registry.update(others)
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **_: self.cost(*args).flops)


def device_type(args: Iterable[Any]) -> str:
    """Kind of device of the first tensor among ``args``."""
    return next(a.device.type for a in args if isinstance(a, Tensor))


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    samples: Samples,
    check: Callable[..., None] = lambda *args: None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    functional: Callable[..., Any] | None = None,
    tolerance: Mapping[torch.dtype, Tolerance] | None = None,
    inline_reference: bool = True,
) -> Op:
    """Register an op and return its record.

    Args:
        schema: ``name(Tensor x, float eps) -> Tensor``; no default values (they would be dropped before dispatch).
        setup_context, backward: the gradient, as ``torch.library.register_autograd`` takes them.
        functional: see :class:`Op`.
        inline_reference: whether a compiled graph may trace through the reference; ``False`` where it reads values
            (a loop over lengths): it is then called as an opaque kernel.

    Raises:
        ValueError: an op of that name is already there, or the reference has other parameters than the schema.
    """
    name, _, signature = schema.partition("(")
    signature = "(" + signature
    if name in OPS:
        raise ValueError(f"op {name!r} is already defined; was its module imported under two names?")
    # torch cannot forget an op: nothing is registered before everything is checked
    wanted = schema_parameters(schema)
    if list(inspect.signature(reference).parameters) != wanted:
        raise ValueError(f"{name}: want a reference with parameters {wanted}, got {inspect.signature(reference)}")
    LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    op = Op(
        name=name,
        signature=signature,
        reference=reference,
        check=check,
        fake=_checked(check, fake),
        cost=cost,
        samples=samples,
        differentiable=backward is not None,
        functional=functional,
        tolerance=tolerance or {},
    )
    op._register_flops()

    def dispatch(*args: Any) -> Any:
        check(*args)
        return op.choose(args).provider.fn(*args)

    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)

    op.provide(REFERENCE, reference, priority={"cpu": 0, "cuda": 0, "meta": 0}, inline=inline_reference)
    OPS[name] = op
    return op


def _checked(check: Callable[..., None], fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        check(*args)
        return fn(*args)

    return run
