"""The table of compiled kernels: a file of JSON with a kernel a line, and a picture for people.

A row's name is what launched it (op, provider, kernel, call), not what launch code chose: so a row of another table with
the same name can be compared with it.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from deepfuse.profiling.machine_code import ARCHS, MachineCode

Name = tuple[str, str, str, str, int]
"""Op, provider, kernel, call, and the how manieth of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTable:
    """Kernels by one Triton for one architecture.

    Attributes:
        kernels: of DeepSeek-V3's sizes.
        samples: those that only samples of ops launch, which are neither shown nor compared.
    """

    triton: str
    arch: str
    kernels: list[MachineCode]
    samples: list[MachineCode] = field(default_factory=list)

    def rows(self, op: str | None = None) -> dict[Name, MachineCode]:
        """All, or those of an op."""
        times: Counter[tuple[str, ...]] = Counter()
        found = {}
        for code in self.kernels:
            if op in (None, code.op):
                name = code.op, code.provider, code.kernel, code.call
                found[(*name, times[name])] = code
                times[name] += 1
        return found

    def write(self, path: Path) -> None:
        kernels, samples = (
            ",\n".join(json.dumps(_fields(code)) for code in codes) for codes in (self.kernels, self.samples)
        )
        head = {"triton": self.triton, "arch": self.arch, "bounds": f"predicted for {ARCHS[self.arch].name}"}
        path.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{kernels}\n], "samples": [\n{samples}\n]}}\n')

    def __rich__(self) -> Group:
        device = ARCHS[self.arch].name
        table = Table(
            title=f"Triton kernels, triton {self.triton}, {self.arch}: compiled, nothing was run", title_justify="left"
        )
        # of one op, the rows differ in their calls
        calls = len({code.op for code in self.kernels}) == 1
        for column in ("op", "kernel", *["call"] * calls, "tokens"):
            table.add_column(column, overflow="fold")
        for column in ("warps", "regs", "spilled", "shared", "CTAs/SM"):
            table.add_column(column, justify="right")
        for column in ("matrix", "copies", f"predicted us, {device}"):
            table.add_column(column, overflow="fold")
        for code in self.kernels:
            name = code.kernel if code.provider == "triton" else f"{code.kernel} ({code.provider})"
            spilled = f"{code.spill_store_bytes}/{code.spill_load_bytes}" if code.spill_bytes else "0"
            table.add_row(
                code.op,
                name,
                *[code.call] * calls,
                tokens_text(code.tokens),
                *map(str, (code.num_warps, code.registers, spilled, code.shared_bytes, code.ctas)),
                _counts(code.matrix),
                _counts(code.copies),
                " .. ".join(f"{bound.predicted_us} {bound.limit}" for bound in code.bounds),
            )
        note = Text(
            "spilled: bytes a thread stores/loads. CTAs/SM: programs a multiprocessor holds at a time. predicted: what a "
            f"call of the op, all its kernels together, takes at least by its FLOPs and bytes and the row of {device}, with "
            "the fewest and the most tokens; nothing here was measured."
        )
        return Group(table, note)


def installed_triton() -> str:
    from importlib.metadata import version

    return version("triton")


def table_of(kernels: Iterable[MachineCode], arch: str) -> KernelTable:
    """In an order that other kernels do not change."""
    found = sorted(kernels, key=_place)
    called, samples = ([code for code in found if bool(code.call) is wanted] for wanted in (True, False))
    return KernelTable(triton=installed_triton(), arch=arch, kernels=called, samples=samples)


def _place(code: MachineCode) -> tuple[Any, ...]:
    return code.op, code.provider, code.kernel, code.tokens, code.call, json.dumps(code.to_json(), sort_keys=True)


def read_table(path: Path) -> KernelTable:
    """A table that was written.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        kernels, samples = (
            [MachineCode.from_json({**fields, "types": {}}) for fields in found[part]]
            for part in ("kernels", "samples")
        )
        return KernelTable(triton=found["triton"], arch=found["arch"], kernels=kernels, samples=samples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"kernels: want a table that `deepfuse kernels --json` wrote, got {path} ({why})") from None


def tokens_text(tokens: list[int]) -> str:
    """The numbers, or of more than three the first and the last."""
    return ", ".join(map(str, tokens)) if len(tokens) <= 3 else f"{tokens[0]} .. {tokens[-1]}"


def _fields(code: MachineCode) -> dict[str, Any]:
    """What the file has: the types are those of the call."""
    fields = code.to_json()
    del fields["types"]
    return fields


def _counts(found: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items())
