"""The record of a kernel that was compiled: what it takes of a multiprocessor, and what it is made of."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deepfuse.ir.device import B200, H100, Device
from deepfuse.ir.op import Op

ARCHS: dict[str, Device] = {"sm_90": H100, "sm_100": B200}
"""What is compiled for, and the device whose row predicts bounds."""

FACTS = (
    *("num_warps", "registers", "spill_bytes", "spill_store_bytes", "spill_load_bytes", "shared_bytes", "ctas"),
    *("matrix", "copies", "stages"),
)
"""What is read from the machine code; all else of a record is known before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a call of an op cannot be faster than: predicted from its cost and the row of a device, not measured.

    Attributes:
        tokens: of the call.
        limit: ``memory`` or ``compute``, whichever takes longer.
    """

    tokens: int
    flops: int
    bytes: int
    predicted_us: float
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        op, provider, kernel: who launched, and what.
        call: arguments of the last call of DeepSeek-V3's sizes that launched it; empty if only samples did.
        tokens: numbers of tokens of such calls.
        bounds: of the op's call with the fewest and the most tokens, all of its kernels together.
        types: of the arguments.
        constants: values that were compiled in.
        digest: of all that decides the machine code (:func:`~deepfuse.profiling.kernel_digest.kernel_digest`).
        num_warps: warps of a program.
        registers: of a thread.
        spill_bytes: stack and local memory of a thread.
        spill_store_bytes, spill_load_bytes: what its instructions move there and back, each counted once.
        shared_bytes: of a program.
        ctas: programs that a multiprocessor holds at a time.
        matrix: how many instructions of each kind multiply tiles.
        copies: how many of each kind and width move data.
        stages: blocks of operands that are in shared memory or on their way at a time, where a loop multiplies them; None
            where none does.
    """

    op: str
    provider: str
    kernel: str
    call: str
    tokens: list[int]
    bounds: list[Bound]
    constants: Mapping[str, str]
    digest: str
    num_warps: int
    registers: int
    spill_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    ctas: int
    matrix: Mapping[str, int]
    copies: Mapping[str, int]
    stages: int | None
    types: Mapping[str, str]

    @property
    def arguments(self) -> dict[str, str]:
        return {**self.types, **self.constants}

    @property
    def wgmma(self) -> bool:
        """Whether Hopper's tensor core instructions are in it."""
        return any(name.endswith("GMMA") for name in self.matrix)

    @property
    def qgmma(self) -> bool:
        """Whether those for FP8 are."""
        return "QGMMA" in self.matrix

    @property
    def tma(self) -> bool:
        """Whether tiles are fetched by the tensor memory accelerator."""
        return "UTMALDG" in self.copies

    @property
    def facts(self) -> dict[str, Any]:
        """What was read from the machine code."""
        return {name: getattr(self, name) for name in FACTS}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "MachineCode":
        return MachineCode(**{**fields, "bounds": [Bound(**bound) for bound in fields["bounds"]]})


def bound_of(op: Op, args: tuple[Any, ...], tokens: int, device: Device) -> Bound:
    """From the op's cost; arithmetic counts at the rate of matrix products in the dtype of the first tensor."""
    cost = op.cost(*args)
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
    # integers and bytes are moved, not multiplied
    rate = device.flops.get(dtype, device.flops[torch.float32])
    compute, memory = cost.flops / rate, cost.bytes / device.memory_bandwidth
    return Bound(
        tokens=tokens,
        flops=int(cost.flops),
        bytes=int(cost.bytes),
        predicted_us=float(f"{max(compute, memory) * 1e6:.4g}"),
        limit="compute" if compute > memory else "memory",
    )


def call_text(args: tuple[Any, ...]) -> str:
    """``bfloat16[64, 7168] 1e-06``: dtypes and shapes, other values as they are."""
    return " ".join(
        f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
        if isinstance(a, torch.Tensor)
        else str(a).removeprefix("torch.")
        for a in args
    )
