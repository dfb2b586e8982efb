"""What there is: the ops and the passes, as tables for people and for programs."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from deepfuse.ir.op import OPS, Op
from deepfuse.ir.provider import choose
from deepfuse.ops import import_ops
from deepfuse.passes.pipeline import Pipeline

import_ops()


@dataclass(frozen=True, slots=True)
class Listing:
    """A table: rows for programs, a picture for people."""

    rows: list[dict[str, Any]]
    title: str

    def to_json(self) -> Any:
        return self.rows

    def __rich__(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for name in self.rows[0]:
            table.add_column(name)
        for row in self.rows:
            table.add_row(*(", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values()))
        return table


@dataclass(frozen=True, slots=True)
class Description:
    """Named facts and a text."""

    facts: dict[str, Any]
    text: str

    def to_json(self) -> Any:
        return {**self.facts, "documentation": self.text}

    def __rich__(self) -> Group:
        table = Table(show_header=False)
        for name, value in self.facts.items():
            lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
            table.add_row(name, "\n".join(lines))
        return Group(Text(self.text), table)


def ops_table(device_type: str) -> Listing:
    """Every op: what it does, its providers, and which one a compiled graph would take on such a device."""
    rows = []
    for name, op in sorted(OPS.items()):
        provider, _ = _choice(op, device_type)
        rows.append(
            {
                "op": name,
                "computes": _module_doc(op).partition("\n")[0],
                "providers": [p.name for p in op.providers],
                device_type: provider,
                "gradient": "yes" if op.differentiable else "no",
            }
        )
    return Listing(rows, f"ops of the dialect; the {device_type} column is what a compiled graph takes for a sample")


def describe_op(name: str, device_type: str) -> Description:
    """One op in full.

    Raises:
        ValueError: there is no op of that name.
    """
    if name not in OPS:
        raise ValueError(f"ops: want an op out of {', '.join(sorted(OPS))}, got {name!r}")
    op = OPS[name]
    args = _sample(op)
    provider, refused = _choice(op, device_type)
    cost = op.cost(*args)
    shapes = [f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" for a in args if isinstance(a, torch.Tensor)]
    return Description(
        {
            "schema": op.schema,
            "providers": {p.name: _provider_text(p) for p in op.providers},
            f"would run on {device_type}": provider,
            "because others": refused or "are not needed",
            "cost of the sample": f"{cost.flops:,} FLOPs, {cost.bytes:,} bytes, for {', '.join(shapes)}",
            "gradient": "registered" if op.differentiable else "none",
            "changes its input": "yes" if op.mutates else "no",
            "file": inspect.getsourcefile(op.reference),
        },
        _module_doc(op),
    )


def passes_table(pipeline: Pipeline) -> Listing:
    """Its passes in order."""
    rows = [
        {
            "pass": p.name,
            "stage": p.stage,
            "class": p.kind,
            "does": p.summary,
            "saves": p.saves,
            "settings": list(p.settings),
        }
        for p in pipeline.passes
    ]
    return Listing(rows, "passes in the order they run")


def _provider_text(provider: Any) -> str:
    devices = ", ".join(f"{device} (priority {n})" for device, n in provider.priority.items())
    return f"{devices}; {'inlined into compiled graphs' if provider.inline else 'called as a kernel'}"


def _choice(op: Op, device_type: str) -> tuple[str, dict[str, str]]:
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"ops: want device 'cpu' or 'cuda', got {device_type!r}")
    choice = choose(op.providers, _sample(op), device_type, compiled=True)
    return choice.provider.name, dict(choice.refused)


def _sample(op: Op) -> tuple[Any, ...]:
    return next(iter(op.samples(torch.device("cpu"), torch.float32)))


def _module_doc(op: Op) -> str:
    return inspect.getdoc(inspect.getmodule(op.reference)) or ""
