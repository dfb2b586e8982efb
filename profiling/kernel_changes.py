"""How kernels differ from those of a table that was kept: new, gone, changed, and whether one became worse.

Worse is what no timing is needed for: registers that spill more, and products that left the tensor cores they ran on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from deepfuse.profiling.kernel_table import KernelTable, Name, tokens_text
from deepfuse.profiling.machine_code import FACTS, MachineCode

COMPARED = (*FACTS, "constants", "tokens", "bounds")
SPILLS = ("spill_bytes", "spill_store_bytes", "spill_load_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One kernel that differs.

    Attributes:
        what: what differs, in words.
        worse: in which way it became worse; empty if in none.
    """

    kind: Literal["new", "gone", "changed"]
    op: str
    kernel: str
    tokens: list[int]
    what: str
    worse: str


@dataclass(frozen=True, slots=True)
class Changes:
    """All of them."""

    changes: list[Change]

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.worse]

    def __rich__(self) -> Table | str:
        if not self.changes:
            return "no kernel differs"
        table = Table(title="kernels that differ", title_justify="left")
        for column in ("", "op", "kernel", "tokens", "what", "worse"):
            table.add_column(column, overflow="fold")
        for c in self.changes:
            table.add_row(c.kind, c.op, c.kernel, tokens_text(c.tokens), c.what, c.worse)
        return table

    def text(self) -> str:
        return "\n".join(
            f"{c.kind} {c.op} {c.kernel} at {tokens_text(c.tokens)} tokens: {c.what}"
            + (f" WORSE: {c.worse}" if c.worse else "")
            for c in self.changes
        )


def check_comparable(kept: KernelTable, triton: str, arch: str) -> None:
    """Raise ``ValueError`` where the kept table is of another Triton or architecture: it says nothing of this one."""
    if (kept.triton, kept.arch) != (triton, arch):
        raise ValueError(
            f"kernels: want a table of triton {triton} for {arch}, got one of triton {kept.triton} for {kept.arch}"
        )


def compare(kept: KernelTable, found: KernelTable, op: str | None = None) -> Changes:
    """What differs, of all kernels or of an op's.

    Raises:
        ValueError: the tables are of different Tritons or architectures.
    """
    check_comparable(kept, found.triton, found.arch)
    before, after = kept.rows(op), found.rows(op)
    changes = [_changed(before[name], code) for name, code in after.items() if name in before]
    changes += [_new(code, _others(before, code)) for name, code in after.items() if name not in before]
    changes += [_gone(code) for name, code in before.items() if name not in after]
    return Changes([change for change in changes if change is not None])


def _others(before: dict[Name, MachineCode], code: MachineCode) -> list[MachineCode]:
    """Kept kernels of the same source: what a new one is held against, which has no row of its own."""
    mine = code.op, code.provider, code.kernel
    return [other for other in before.values() if (other.op, other.provider, other.kernel) == mine]


def _changed(before: MachineCode, after: MachineCode) -> Change | None:
    what = [f"{name} {text}" for name in COMPARED for text in _differences(getattr(before, name), getattr(after, name))]
    return _change("changed", after, "; ".join(what), _worse(before, after)) if what else None


def _new(code: MachineCode, others: list[MachineCode]) -> Change:
    worse = ""
    if others:
        # the worst of them may be what this one replaces
        spilled = min((_worse_spills(other, code) for other in others), key=len)
        weaker = min((_weaker(other, code) for other in others), key=len)
        worse = ", ".join(filter(None, (spilled, weaker)))
    elif code.spill_bytes:
        worse = f"spills {code.spill_bytes} bytes"
    what = f"{code.registers} registers, {code.spill_bytes} bytes spilled, {code.shared_bytes} shared, {_text(code.matrix)}"
    return _change("new", code, what, worse)


def _gone(code: MachineCode) -> Change:
    return _change("gone", code, "no call launches it", "")


def _change(kind: Literal["new", "gone", "changed"], code: MachineCode, what: str, worse: str) -> Change:
    return Change(kind=kind, op=code.op, kernel=code.kernel, tokens=list(code.tokens), what=what, worse=worse)


def _worse(before: MachineCode, after: MachineCode) -> str:
    return ", ".join(filter(None, (_worse_spills(before, after), _weaker(before, after))))


def _worse_spills(before: MachineCode, after: MachineCode) -> str:
    if all(getattr(after, name) <= getattr(before, name) for name in SPILLS):
        return ""
    return f"spills {after.spill_bytes} bytes, {before.spill_bytes} before"


def _weaker(before: MachineCode, after: MachineCode) -> str:
    had, has = _strength(before.matrix), _strength(after.matrix)
    if has[0] >= had[0] and has[1] >= had[1]:
        return ""
    return f"lost {_text(before.matrix)}, has {_text(after.matrix)}"


def _strength(matrix: Iterable[str]) -> tuple[int, bool]:
    """0 without matrix instructions, 1 with those of a warp, 2 with those of a warpgroup; and whether they take FP8."""
    wide = [name for name in matrix if name.endswith("GMMA") or name.startswith("UTC")]
    level = 2 if wide else 1 if list(matrix) else 0
    return level, any(name.removeprefix("UTC").startswith("Q") for name in matrix)


def _differences(before: Any, after: Any) -> Iterator[str]:
    if before == after:
        return
    if not (isinstance(before, dict) and isinstance(after, dict)):
        yield f"{_text(before)} -> {_text(after)}"
        return
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "no matrix instructions"
    if isinstance(value, list):
        return ",".join(f"{v.predicted_us} us predicted" if hasattr(v, "predicted_us") else str(v) for v in value)
    return str(value)
