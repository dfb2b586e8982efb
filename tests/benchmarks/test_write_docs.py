"""The tables of README.md and docs/ are what the committed results say."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark_scripts import load_script
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_results import Results

docs = load_script("write_docs")
TEXTS = ("README.md", "docs/fp8.md", "docs/parallelism.md", "docs/performance.md", "docs/figures/cpu.svg")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The texts and the results, to be changed."""
    for name in (*TEXTS, "benchmarks/results"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if "." not in name else shutil.copy)(docs.ROOT / name, target)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_those_of_the_results(name: str) -> None:
    path = docs.ROOT / name
    assert docs.texts()[path] == path.read_text(), "run make docs"


def test_a_figure_that_changed_is_written_and_reported(checkout: Path) -> None:
    path = docs.RESULTS / "cpu.json"
    results = Results.read(path)
    row = results.row("decode, context 64, float32")
    assert row is not None
    figures = {**row.figures, "deepfuse": (4321.0, 4300.0, 4400.0)}
    results.with_row(replace(row, figures=figures)).write(path)
    with pytest.raises(
        SystemExit,
        match=r"docs/figures/cpu\.svg, README\.md, docs/performance\.md: not what the results say; written anew",
    ):
        docs.main()
    assert "| decode, context 64 | float32 | 4321.00 |" in (checkout / "README.md").read_text()
    performance = (checkout / "docs" / "performance.md").read_text()
    assert "| decode, context 64, float32 | ms | 4321 (4300 to 4400) |" in performance
    docs.main()


def test_what_was_not_measured_is_said(checkout: Path) -> None:
    path = docs.RESULTS / "cpu.json"
    results = Results.read(path)
    replace(results, rows=results.rows[:2], left_out={"prefill, float32": "no time"}).write(path)
    texts = {path.name: text for path, text in docs.texts().items()}
    assert "Not measured yet: prefill, float32." in texts["README.md"] and "builds in" not in texts["README.md"]
    assert "- prefill, float32: no time" in texts["performance.md"]


def test_every_suite_has_its_place(checkout: Path) -> None:
    for name in docs.suites():
        if name not in ("cpu", "model", "predictions"):  # README.md and parallelism.md want these
            (docs.RESULTS / f"{name}.json").unlink(missing_ok=True)
    text = docs.texts()[checkout / "docs" / "performance.md"]
    for name, suite in docs.suites().items():
        assert f"## {name}\n" in text and suite.question in text
    for row in Results.read(docs.RESULTS / "cpu.json").rows:
        assert f"{row.command} --json benchmarks/results/cpu.json" in text


def test_what_each_alternative_reached_is_said_in_words() -> None:
    bench = Bench(Results(suite="toy", command="", device={}, versions={}))
    bench.row("a", {"ours": 1.0, "theirs": 2.0}, share={"ours": 0.5, "theirs": 0.25}, flops=7)
    (row,) = bench.results.rows
    assert "| row | unit | ours | theirs | share | date |" in docs.part_of("toy", "", [row])
    assert any("| ours 0.5, theirs 0.25 |" in line for line in docs.part_of("toy", "", [row]))
