"""Tables and figures of README.md and docs/, made from the results in `benchmarks/results/`: ``make docs``.

    python benchmarks/write_docs.py      writes them anew; fails where that changed one, and says which

A suite's results come into `docs/performance.md` by themselves, each part with its command; README.md and `docs/fp8.md` have
tables of their own, laid out here.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from sections import table, with_section

from deepfuse.profiling.bench_plot import bar_chart
from deepfuse.profiling.bench_results import Figure, Results, Row, words
from deepfuse.profiling.bench_suites import suites

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EAGER, COMPILED = "transformers eager", "transformers compiled"
FIGURES = ("cpu",)
"""Suites whose figure stands in `docs/performance.md`."""


def texts() -> dict[Path, str]:
    """Each text and figure as the results have it."""
    found = {suite: Results.read(path) for suite in suites() if (path := RESULTS / f"{suite}.json").exists()}
    ngram = json.loads((RESULTS / "ngram.json").read_text())
    by_text: dict[str, dict[str, str]] = {
        "README.md": {"cpu": readme_cpu(found["cpu"]), "model": readme_model(found["model"], ngram)},
        "docs/fp8.md": {"quality": fp8_quality(found["model"]), "memory": fp8_memory(found["model"])},
        "docs/parallelism.md": {"predictions": predictions(found["predictions"])},
        "docs/performance.md": {"suites": performance(found)},
    }
    out = {ROOT / "docs" / "figures" / f"{suite}.svg": bar_chart(found[suite]) for suite in FIGURES}
    for name, sections in by_text.items():
        text = (ROOT / name).read_text()
        for section, content in sections.items():
            text = with_section(text, f"write_docs: {section}", content)
        out[ROOT / name] = text
    return out


def performance(found: dict[str, Results]) -> str:
    """All rows of all suites, part by part."""
    lines = []
    for name, suite in suites().items():
        lines += [f"## {name}", "", suite.question, ""]
        if name not in found:
            lines += ["Not measured yet:", "", *_shell(f"deepfuse bench {name} --json benchmarks/results/{name}.json")]
            continue
        results = found[name]
        lines += [f"Device: {words(results.device)}. Versions: {words(results.versions)}.", ""]
        if name in FIGURES:
            lines += [f"![{name}](figures/{name}.svg)", ""]
        for part, rows in itertools.groupby(results.rows, key=lambda row: row.part):
            lines += part_of(name, part, list(rows))
        if results.left_out:
            lines += ["Not measured:", "", *(f"- {what}: {why}" for what, why in results.left_out.items()), ""]
    return "\n".join(lines)


def part_of(suite: str, part: str, rows: list[Row]) -> list[str]:
    """A table of the rows of one part, with the command that measures them again."""
    labels = list(dict.fromkeys(label for row in rows for label in row.figures))
    facts = [fact for fact in dict.fromkeys(fact for row in rows for fact in row.facts) if fact not in NOT_SHOWN]
    cells = []
    for row in rows:
        first = next(iter(row.figures))
        shown = [_figure(row, label, first) for label in labels]
        cells.append([row.name, row.unit, *shown, *(_fact(row.facts.get(fact)) for fact in facts), row.date])
    head = ["row", "unit", *labels, *facts, "date"]
    lines = [f"### {suite}: {part}", ""] if part else []
    return [
        *lines,
        *_shell(f"{rows[0].command} --json benchmarks/results/{suite}.json"),
        *table(head, cells).splitlines(),
        "",
    ]


NOT_SHOWN = ("what", "dtype", "kind", "flops", "bytes", "tried", "ceiling", "B", "E", "M", "N", "K", "tokens", "shape")
"""Facts that the row's name says already, that follow from it, or that are many."""


def readme_cpu(results: Results) -> str:
    """Milliseconds of a step and a prefill beside the peers, and seconds of a build."""
    shown = [row for row in results.rows if row.part.startswith(("decode", "prefill", "training"))]
    peers = [label for label in (EAGER, COMPILED) if any(label in row.figures for row in shown)]
    cells = []
    for row in shown:
        ours = row.figures["deepfuse"][0]
        beside = [
            f"{row.figures[p][0]:.2f} ({row.figures[p][0] / ours:.2f}x)" if p in row.figures else "" for p in peers
        ]
        share = row.facts.get("share of bound")
        cells.append(
            [row.facts["what"], row.facts["dtype"], f"{ours:.2f}", *beside, "" if share is None else f"{share:.0%}"]
        )
    device, versions = results.device, results.versions
    lines = [
        f"""\
Milliseconds, batch 1, of a model of the real architecture with 60 million parameters (`benchmark_config` in
[benchmarks/cpu.py](benchmarks/cpu.py)), beside transformers {versions["transformers"]}: eager, and compiled (for decode with a static
cache). {device["name"]}, {device["threads"]} threads, {device["instructions"]}; torch {versions["torch"].partition("+")[0]}; {_dates(shown)}. All run interleaved in one
process; medians of seven rounds. The last column is what reading the active weights once would take, as a share of the
step. [docs/performance.md](docs/performance.md) has all rows, with their spread.
""",
        table(["what", "dtype", "deepfuse", *peers, "share of the bound"], cells),
    ]
    cold, warm, imported = (results.row(name) for name in ("build, cold", "build, warm", "import deepfuse"))
    if cold and warm and imported:
        lines.append(f"""\
The shipped model builds in {cold.figures["df.build"][0]:.0f} s with an empty compile cache (batch 1 to 8: one prefill and four decode graphs) and in
{warm.figures["df.build"][0]:.1f} s with a filled one ({warm.facts["seconds of the process"]:.1f} s for the whole process, imports included). `import deepfuse` itself costs
{imported.figures["import"][0]:.1f} ms over `import torch`.
""")
    missing = "; ".join(results.left_out)
    lines += [f"Not measured yet: {missing}.", ""] if missing else []
    return "\n".join([*lines, *_shell("deepfuse bench cpu --json benchmarks/results/cpu.json")])


def readme_model(results: Results, ngram: dict[str, Any]) -> str:
    """Bits per byte beside models of other kinds."""
    bits = {row.facts["kind"]: row.figures["v3-tiny"][0] for row in results.rows if row.part == "held-out text"}
    labels = {"float32": "float32", "bfloat16": "bfloat16", "fp8_weights": "weights in FP8", "fp8": "FP8"}
    cells = [[f"v3-tiny, {label}", f"{bits[kind]:.4f}"] for kind, label in labels.items() if kind in bits]
    cells.append(
        ["5-gram, interpolated modified Kneser-Ney, over the same tokens", f"{ngram['ngram5_kneser_ney_bpb']:.4f}"]
    )
    cells.append(["xz -9e, 64 MiB dictionary", f"{ngram['xz9_bpb']:.4f}"])
    return "\n".join(
        [
            table(["bits per byte of the held-out text", ""], cells),
            *_shell("deepfuse bench model --json benchmarks/results/model.json"),
            *_shell("python benchmarks/ngram.py --json benchmarks/results/ngram.json"),
        ]
    )


def fp8_quality(results: Results) -> str:
    """What FP8 costs in bits per byte."""
    rows = {row.facts["kind"]: row for row in results.rows if row.part == "held-out text"}
    first = rows["bfloat16"].figures["v3-tiny"][0]
    cells = []
    for kind, row in rows.items():
        bits = row.figures["v3-tiny"][0]
        agreement, size = row.facts.get("greedy agreement"), row.facts.get("weights, MB")
        cells.append(
            [
                kind,
                f"{bits:.4f}",
                f"{bits / first - 1:+.2%}",
                "" if agreement is None else f"{agreement:.1%}",
                "" if size is None else f"{size:.1f} MB",
            ]
        )
    return table(["model", "bits per byte", "against bfloat16", "greedy agreement", "weights"], cells)


def fp8_memory(results: Results) -> str:
    """What a process with FP8 weights takes."""
    rows = [row for row in results.rows if row.part == "memory"]
    cells = [
        [row.facts["kind"], f"{row.facts['weights, MB']:.0f} MB", f"{row.figures['peak'][0]:.0f} MB"] for row in rows
    ]
    return table(["weights", "their size", "peak"], cells)


def predictions(results: Results) -> str:
    """Measured and predicted milliseconds of each form of overlap, side by side."""
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in results.rows:
        if "kind" in row.facts:
            shown = f"{row.figures['measured'][0]:.4g}"
            if "predicted" in row.figures:
                shown += f", predicted {row.figures['predicted'][0]:.4g} ({row.facts['difference']})"
            lines.setdefault((row.part, row.facts["tokens"]), {})[row.facts["kind"]] = shown
    kinds = list(dict.fromkeys(kind for line in lines.values() for kind in line))
    cells = [[part, str(tokens), *(line.get(kind, "") for kind in kinds)] for (part, tokens), line in lines.items()]
    command = "deepfuse bench predictions --json benchmarks/results/predictions.json"
    return "\n".join([table(["step", "tokens", *kinds], cells), *_shell(command)])


def _figure(row: Row, label: str, first: str) -> str:
    """Median, the quartiles where they differ, and how many times that of the first alternative."""
    figure: Figure | None = row.figures.get(label)
    if figure is None:
        return ""
    median, low, high = figure
    text = f"{median:.5g}" if low == high else f"{median:.5g} ({low:.5g} to {high:.5g})"
    ours = row.figures[first][0]
    return text if label == first or not ours else f"{text}, {median / ours:.2f}x"


def _fact(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        # of each alternative
        return ", ".join(f"{label} {_fact(each)}" for label, each in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _dates(rows: list[Row]) -> str:
    days = sorted({row.date for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _shell(command: str) -> list[str]:
    return ["```sh", command, "```", ""]


def main() -> None:
    wanted = texts()
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path, text in wanted.items():
        path.write_text(text)
    if changed:
        names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
        raise SystemExit(f"make docs: {names}: not what the results say; written anew")


if __name__ == "__main__":
    main()
