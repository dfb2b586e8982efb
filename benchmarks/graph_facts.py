"""Launches and bytes of DeepSeek-V3's graphs before and after each pass, counted without weights and without a GPU.

    python benchmarks/graph_facts.py            computes, and writes `benchmarks/results/graph_facts.json`
    python benchmarks/graph_facts.py --keep     writes only the tables of `docs/passes.md`, from what there is

`v3-671b` is cut to a dense layer and one of experts; what a further layer of experts adds is a layer's own. Its graphs
are captured with fake tensors on a GPU that is not there, rewritten by the first n passes, lowered, and counted by the
rule of `profiling/regions.py`. Beside them stands plain Inductor: no pass, and each op's reference in the graph.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sections import computed_or_kept, table, write_sections
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import deepfuse.runtime.describe  # noqa: F401 - defines every op
from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.device import H200
from deepfuse.ir.op import OPS
from deepfuse.ir.private import uncompiled_backend, with_own_code
from deepfuse.passes.check_values import copied
from deepfuse.passes.pipeline import Pipeline, default
from deepfuse.passes.record import Pass
from deepfuse.passes.runner import HOOKS, Runner
from deepfuse.profiling.fake_step import Workload, fake_model, hopper
from deepfuse.profiling.regions import Launch, launches
from deepfuse.runtime.weight_layout import lay_side_by_side, layout_key

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "graph_facts.json"
TEXT = ROOT / "docs" / "passes.md"
DEVICE = H200
PLAIN = "plain Inductor"
UNREWRITTEN = "no pass"
LAYER = "a layer of experts"
FORMS: dict[str, Callable[[CausalLM], object]] = {"bfloat16": lambda model: None, "FP8": to_fp8}
"""What is done to the model's weights."""


WORKLOADS = (
    Workload("decode, 1 sequence", 1, 1),
    Workload("decode, 8 sequences", 8, 1),
    Workload("prefill, 2048 tokens", 1, 2048),
)


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph before any pass, and which of its inputs are weights."""

    module: fx.GraphModule
    is_weight: tuple[bool, ...]
    layout: str
    """Of the weights, as :func:`layout_key` has it."""

    def run(self, pipeline: Pipeline, providers: Mapping[str, str]) -> tuple[list[Launch], dict[str, int]]:
        """Launches of the graph rewritten and lowered, and how often each pass rewrote it."""
        known = {"device": DEVICE, "max_seq_len": 2 * WORKLOADS[0].cached, "layout": self.layout}
        settings = {"providers": dict(providers), **known}
        runner = Runner(pipeline, settings, strict=True)
        graph = copied(self.module.graph).graph
        with torch.no_grad(), hopper():
            for hook in HOOKS:
                runner.run(graph, hook)
            graph.eliminate_dead_code()
            inputs = [node for node in graph.nodes if node.op == "placeholder"]
            weights = [node for node, weight in zip(inputs, self.is_weight, strict=True) if weight]
            found = launches(graph, weights)
        return found, {entry.name: entry.rewrites for entry in runner.journal.graphs[-1].passes}


def capture(config: Config, workload: Workload, form: str = "bfloat16") -> Captured:
    """The graph of a step, on fake tensors; activations are bfloat16, and weights what ``form`` says."""
    dtype = torch.bfloat16
    mode, device = FakeTensorMode(), torch.device("cuda")
    graphs: list[fx.GraphModule] = []

    def keep(hook: str, module: fx.GraphModule) -> None:
        if hook == "joint":
            graphs.append(fx.GraphModule(module, copied(module.graph).graph))

    with mode, torch.no_grad():
        model = fake_model(config, dtype, device)
        FORMS[form](model)
        lay_side_by_side(model, with_experts=True)
        caches = workload.caches(config, dtype, device)
        step, given = workload.inputs(device)
        torch.compile(with_own_code(step), fullgraph=True, dynamic=False, backend=uncompiled_backend(keep))(
            model, caches, *given
        )
    (module,) = graphs
    others = {(tuple(t.shape), t.dtype) for t in (*caches, *given)}
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    is_weight = tuple((tuple(v.shape), v.dtype) not in others for v in values)
    # each cache is an input of its own; what the model computes once (rotary frequencies) counts as a weight
    assert is_weight.count(False) == len(caches) + len(given)
    return Captured(module, is_weight, layout_key(model))


def cut(layers: int) -> Config:
    """DeepSeek-V3 with so many layers, of which the first is dense."""
    return replace(PRESETS["v3-671b"](), num_hidden_layers=layers, first_k_dense_replace=1, num_nextn_predict_layers=0)


def only(*names: str) -> Pipeline:
    return Pipeline(tuple(p for p in default().passes if p.name in names))


def summary(found: list[Launch]) -> dict[str, int]:
    """Launches and bytes by kind."""
    out = {"launches": sum(launch.kernels for launch in found)}
    for kind in ("matmul", "attention", "kernel", "region"):
        out[f"{kind} launches"] = sum(launch.kernels for launch in found if launch.kind == kind)
        out[f"{kind} bytes"] = sum(launch.activation_bytes for launch in found if launch.kind == kind)
    out["weight bytes"] = sum(launch.weight_bytes for launch in found if launch.kind != "matmul")
    return out


def rows_of(captured: Captured) -> tuple[dict[str, dict[str, int]], Counter[str]]:
    """Plain Inductor, then our graph with no pass but ``lower``, then with one pass more each time.

    Returns:
        Their summaries, and the launches of the last by name.
    """
    found, _ = captured.run(only("lower"), {name: "reference" for name in OPS})
    rows = {PLAIN: summary(found)}
    names: list[str] = []
    for name in (None, *(n for n in default().names if n != "lower")):
        names += [name] if name else []
        found, rewrites = captured.run(only(*names, "lower"), {})
        if name is None or rewrites[name]:
            rows[name or UNREWRITTEN] = summary(found)
    by_name: Counter[str] = Counter()
    for launch in found:
        by_name[launch.name] += launch.kernels
    return rows, by_name


def facts_of(workload: Workload, form: str) -> dict[str, Any]:
    """Of two layers, and what a third adds: a layer of experts."""
    (two, names_two), (three, names_three) = (rows_of(capture(cut(layers), workload, form)) for layers in (2, 3))
    layer = {name: {key: three[name][key] - row[key] for key in row} for name, row in two.items()}
    return {"two layers": two, LAYER: layer, "launches by name": dict(sorted((names_three - names_two).items()))}


def compute() -> dict[str, Any]:
    facts = {form: {workload.name: facts_of(workload, form) for workload in WORKLOADS} for form in FORMS}
    return {"torch": torch.__version__.partition("+")[0], "device": DEVICE.name, **facts}


def outside_matmuls(row: Mapping[str, int]) -> int:
    """Bytes of activations that launches other than matrix products move."""
    return row["attention bytes"] + row["kernel bytes"] + row["region bytes"]


def facts_table(rows: Mapping[str, Mapping[str, int]]) -> str:
    head = [
        "after",
        "launches",
        "matmuls",
        "attention",
        "others",
        "MB outside matmuls",
        "of attention",
        "of others",
        "of weights",
    ]
    cells = []
    for name, row in rows.items():
        others = row["kernel bytes"] + row["region bytes"]
        cells.append(
            [
                name,
                str(row["launches"]),
                str(row["matmul launches"]),
                str(row["attention launches"]),
                str(row["kernel launches"] + row["region launches"]),
                *(
                    f"{size / 1e6:.2f}"
                    for size in (outside_matmuls(row), row["attention bytes"], others, row["weight bytes"])
                ),
            ]
        )
    return table(head, cells)


def summary_table(facts: Mapping[str, Any]) -> str:
    """Plain Inductor beside all passes."""
    head = ["step", "launches", "MB outside matmuls", "times less", "without attention", "times less"]
    cells = []
    for workload, parts in facts.items():
        for part in ("two layers", LAYER):
            ends = [parts[part][PLAIN], list(parts[part].values())[-1]]
            moved = [outside_matmuls(row) for row in ends]
            others = [size - row["attention bytes"] for size, row in zip(moved, ends, strict=True)]
            row = [f"{workload}: {part}", f"{ends[0]['launches']} -> {ends[1]['launches']}"]
            for before, after in (moved, others):
                row += [f"{before / 1e6:.1f} -> {after / 1e6:.1f}", f"{before / after:.2f}"]
            cells.append(row)
    return table(head, cells)


def passes_table() -> str:
    """Every pass as its file describes it."""
    rows = [
        [f"`{p.name}`", p.stage, p.kind, p.summary, p.saves or _part(p, "Why"), _part(p, "Requires")]
        for p in default().passes
    ]
    head = ["pass", "stage", "class", "does", "saves", "requires"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def _part(p: Pass, label: str) -> str:
    """A labelled part of the docstring of a pass, on one line."""
    module = inspect.getmodule(p.declared)
    text = inspect.getdoc(module) or ""
    found = re.search(rf"^{label}: (.*?)(?=^[A-Z]\w+: |\n\n|\Z)", text + "\n", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by the section of `docs/passes.md`."""
    out = {"graph_facts: passes": passes_table()}
    for form in FORMS:
        out[f"graph_facts: {form}"] = summary_table(results[form])
        for workload, parts in results[form].items():
            for part in ("two layers", LAYER):
                out[f"graph_facts: {form}, {workload}, {part}"] = facts_table(parts[part])
            names = [f"{count} {name}" for name, count in parts["launches by name"].items()]
            out[f"graph_facts: {form}, {workload}, launches"] = f"{', '.join(names)}.\n"
    return out


def main() -> None:
    results = computed_or_kept(__doc__, RESULTS, compute)
    write_sections(TEXT, tables(results))


if __name__ == "__main__":
    main()
