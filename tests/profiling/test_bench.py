"""The runner of benchmarks: rows are kept as they are measured, what is left out is said, baselines are comparable."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_against import changes, comparison
from deepfuse.profiling.bench_device import facts
from deepfuse.profiling.bench_plot import bar_chart
from deepfuse.profiling.bench_results import Results
from deepfuse.profiling.bench_suites import run_suite, suites
from deepfuse.profiling.timing import Timing

TOY = '''"""How long does nothing take,
beside nothing?

More words.
"""

from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from toy_neighbour import WHY


def suite(bench: Bench) -> None:
    if bench.wants("first, a", seconds=1):
        bench.interleaved("row a", {"ours": lambda: None, "theirs": lambda: None}, unit="us", rounds=5, shape=[2, 3])
        bench.leave_out("row a, another", WHY)
    if bench.wants("second, b", seconds=1000):
        bench.row("row b", {"ours": 123456.789}, unit="GB/s", better="higher")


if __name__ == "__main__":
    run_script(__file__)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one suite, and of a file that is none."""
    path = tmp_path / "benchmarks"
    path.mkdir()
    (path / "toy.py").write_text(TOY)
    (path / "toy_neighbour.py").write_text('"""No suite."""\n\nWHY = "not installed"\n')
    return path


@pytest.fixture
def quiet() -> Console:
    return Console(file=StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def results(**rows: tuple[float, float, float]) -> Results:
    """Of a suite ``toy``: a row for each figure."""
    bench = Bench(Results(suite="toy", command="", device=facts(torch.device("cpu")), versions={}))
    for name, (median, low, high) in rows.items():
        bench.row(name, {"ours": Timing(median, low, high)}, unit="s")
    return bench.results


def test_suites_are_the_files_that_have_one(folder: Path) -> None:
    assert {name: suite.question for name, suite in suites(folder).items()} == {
        "toy": "How long does nothing take, beside nothing?"
    }


def test_a_run_is_written_and_read(folder: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "out.json"
    run = run_suite("toy", json=path, folder=folder, console=quiet)
    assert Results.read(path) == run and run.finished
    first, second = run.rows
    assert (first.name, first.part, first.unit, first.facts) == ("row a", "first, a", "us", {"shape": [2, 3]})
    assert list(first.figures) == ["ours", "theirs"]
    assert all(0 < low <= median <= high < 1e4 for median, low, high in first.figures.values())
    assert second.figures == {"ours": (123457.0,) * 3} and second.better == "higher"
    assert second.command == 'deepfuse bench toy --only "second, b"'
    assert run.left_out == {"row a, another": "not installed"}
    assert run.device == facts(torch.device("cpu")) and run.versions["torch"] == torch.__version__
    for words in ("row a", "row b", "left out", "not installed", "How long does nothing take"):
        assert words in printed(quiet)


def test_what_the_budget_has_no_room_for_is_listed(folder: Path, tmp_path: Path, quiet: Console) -> None:
    run = run_suite("toy", json=tmp_path / "out.json", budget=60, folder=folder, console=quiet)
    assert [row.name for row in run.rows] == ["row a"]
    assert run.left_out["second, b"].startswith("takes some 1000 s, of the budget ")
    assert "left out second, b: takes some 1000 s" in printed(quiet)
    assert Results.read(tmp_path / "out.json").left_out == run.left_out


def test_a_suite_may_have_a_budget_of_its_own(folder: Path, quiet: Console) -> None:
    (folder / "toy.py").write_text(TOY.replace("def suite", "BUDGET = 60\n\n\ndef suite"))
    assert "second, b" in run_suite("toy", folder=folder, console=quiet).left_out
    assert "second, b" not in run_suite("toy", budget=2000, folder=folder, console=quiet).left_out


def test_a_run_that_is_cut_keeps_what_it_has(folder: Path, tmp_path: Path, quiet: Console) -> None:
    (folder / "toy.py").write_text(
        TOY.replace('bench.row("row b"', 'raise KeyboardInterrupt\n        bench.row("row b"')
    )
    with pytest.raises(KeyboardInterrupt):
        run_suite("toy", json=tmp_path / "out.json", folder=folder, console=quiet)
    kept = Results.read(tmp_path / "out.json")
    # it was cut before the first row of the second part, so that nothing is known of that
    assert [row.name for row in kept.rows] == ["row a"] and not kept.finished
    assert [path.name for path in tmp_path.glob("out*")] == ["out.json"]


def test_parts_measured_one_by_one_are_a_whole_suite(folder: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "out.json"
    assert not run_suite("toy", json=path, only="second", folder=folder, console=quiet).finished
    assert run_suite("toy", json=path, only="first", folder=folder, console=quiet).finished
    assert Results.read(path).finished
    # a part that is new since
    (folder / "toy.py").write_text(
        TOY.replace(
            "def suite(bench: Bench) -> None:",
            """def suite(bench: Bench) -> None:
    bench.wants("third", seconds=1)""",
        )
    )
    assert not run_suite("toy", json=path, only="first", folder=folder, console=quiet).finished


def test_a_part_that_was_cut_is_not_finished_until_it_is_measured_whole(
    folder: Path, tmp_path: Path, quiet: Console
) -> None:
    path = tmp_path / "out.json"
    (folder / "toy.py").write_text(TOY.replace("WHY)\n", "WHY)\n        raise KeyboardInterrupt\n"))
    with pytest.raises(KeyboardInterrupt):
        run_suite("toy", json=path, folder=folder, console=quiet)
    assert Results.read(path).left_out["first, a"] == "the run was cut"
    (folder / "toy.py").write_text(TOY)
    assert not run_suite("toy", json=path, only="second", folder=folder, console=quiet).finished
    whole = run_suite("toy", json=path, only="first", folder=folder, console=quiet)
    assert whole.finished and "first, a" not in whole.left_out and Results.read(path) == whole


def test_what_was_left_out_is_no_longer_once_it_is_a_row() -> None:
    bench = Bench(Results(suite="toy", command="", device={"kind": "cpu"}, versions={}))
    bench.leave_out("a", "they disagree")
    bench.row("a", {"ours": 1.0}, unit="s")
    assert not bench.results.left_out


def test_one_part_is_measured_anew_among_the_others(folder: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "out.json"
    before = run_suite("toy", json=path, folder=folder, console=quiet)
    (folder / "toy.py").write_text(TOY.replace("123456.789", "2.0").replace("not installed", "no"))
    after = run_suite("toy", json=path, only="second", folder=folder, console=quiet)
    assert after.rows[0] == before.rows[0] and after.left_out == before.left_out
    assert after.rows[1].figures == {"ours": (2.0, 2.0, 2.0)} and after.finished
    # what is measured now is no longer left out
    limited = run_suite("toy", json=path, budget=60, folder=folder, console=quiet)
    assert "second, b" in limited.left_out
    whole = run_suite("toy", json=path, only="second", folder=folder, console=quiet)
    assert "second, b" not in whole.left_out and "row a, another" in whole.left_out
    with pytest.raises(ValueError, match="want --only out of first, a; second, b, got 'third'"):
        run_suite("toy", json=path, only="third", folder=folder, console=quiet)


def test_rows_of_other_versions_do_not_come_into_one_table(folder: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "out.json"
    run = run_suite("toy", json=path, folder=folder, console=quiet)
    replace(run, versions={**run.versions, "torch": "1.0"}).write(path)
    with pytest.raises(ValueError, match=r"want torch 1\.0, as the other rows of .*out\.json, got "):
        run_suite("toy", json=path, only="second", folder=folder, console=quiet)


def test_spread_decides_what_is_the_same() -> None:
    before = results(same=(1.0, 0.9, 1.1), faster=(1.0, 0.9, 1.1), slower=(1.0, 0.9, 1.1), gone=(1.0, 0.9, 1.1))
    now = results(same=(1.2, 1.1, 1.3), faster=(0.5, 0.4, 0.89), slower=(2.0, 1.11, 3.0), come=(1.0, 0.9, 1.1))
    found = {change.row: (change.verdict, change.ratio) for change in changes(before, now, [r.name for r in now.rows])}
    assert found == {
        "same": ("same", 1.0 / 1.2),
        "faster": ("better", 2.0),
        "slower": ("worse", 0.5),
        "come": ("new", None),
        "gone": ("not run", None),
    }


def test_higher_may_be_better() -> None:
    def run(value: float) -> Results:
        bench = Bench(Results(suite="toy", command="", device={"kind": "cpu"}, versions={}))
        bench.row("row", {"ours": value}, unit="GB/s", better="higher")
        return bench.results

    (change,) = changes(run(2.0), run(3.0), ["row"])
    assert (change.verdict, change.ratio) == ("better", 1.5)


def test_a_comparison_names_versions_that_differ(quiet: Console) -> None:
    before, now = results(a=(1.0, 1.0, 1.0)), results(a=(2.0, 1.5, 2.5))
    before, now = replace(before, versions={"torch": "1.0"}), replace(now, versions={"torch": "2.0"})
    quiet.print(comparison(before, now, ["a"]))
    assert "a baseline of torch 1.0" in printed(quiet) and "2 (1.5 to 2.5)" in printed(quiet)


def test_a_baseline_of_another_device_is_refused(folder: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "out.json"
    run = run_suite("toy", json=path, folder=folder, console=quiet)
    run_suite("toy", json=path, against=path, folder=folder, console=quiet)
    assert "against the baseline" in printed(quiet)
    theirs = {**run.device, "name": "Abacus"}
    replace(run, device=theirs).write(path)
    message = rf"want results of this device \(.*name {run.device['name']}.*\), got .*name Abacus.* in .*out\.json"
    with pytest.raises(ValueError, match=message.replace("(R)", r"\(R\)")):
        run_suite("toy", against=path, folder=folder, console=quiet)
    replace(run, suite="other").write(path)
    with pytest.raises(ValueError, match="want results of toy, got other in "):
        run_suite("toy", against=path, folder=folder, console=quiet)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [1]}', '{"rows": []}', "\x00"])
def test_a_baseline_that_is_none_is_refused(content: str, folder: Path, tmp_path: Path, quiet: Console) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"want a file that deepfuse bench --json wrote, got .*x\.json"):
        run_suite("toy", against=tmp_path / "x.json", folder=folder, console=quiet)


@pytest.mark.parametrize("change", [("figures", None), ("device", "H200"), ("versions", ["torch"]), ("left_out", None)])
def test_a_baseline_with_something_else_in_it_is_refused(change, folder: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "x.json"
    run_suite("toy", json=path, folder=folder, console=quiet)
    content = json.loads(path.read_text())
    if change[0] in content:
        content[change[0]] = change[1]
    else:
        content["rows"][0]["figures"] = {"ours": [1, 2]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"want a file that deepfuse bench --json wrote, got .*x\.json"):
        run_suite("toy", against=path, folder=folder, console=quiet)


def test_what_cannot_run_is_one_error(folder: Path, tmp_path: Path, quiet: Console, monkeypatch) -> None:
    def refused(match: str, name: str = "toy", **options) -> None:
        with pytest.raises(ValueError, match=match):
            run_suite(name, console=quiet, **{"folder": folder, **options})

    refused("want a checkout of deepfuse, which has nowhere/, got", folder=tmp_path / "nowhere")
    refused("want a suite out of toy, got 'nothing'", "nothing")
    refused("want --budget > 0, got 0", budget=0)
    refused("want --budget > 0, got nan", budget=float("nan"))
    refused("want --json to be a file in a folder that exists, got", json=tmp_path / "no" / "x.json")
    refused("want --json to be a file in a folder that exists, got", json=tmp_path)
    # a device would be replaced by a file
    os.mkfifo(tmp_path / "fifo")
    refused("want --json to be a file in a folder that exists, got", json=tmp_path / "fifo")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    refused(r"want --json to be a file that can be written, got .*x\.json", json=tmp_path / "x.json")
    (folder / "toy.py").write_text(TOY.replace("def suite", 'DEVICE = "cuda"\n\n\ndef suite'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("want a CUDA device for the suite toy, got none")


def test_rows_are_checked() -> None:
    bench = Bench(Results(suite="toy", command="", device={"kind": "cpu"}, versions={}))
    bench.row("a", {"ours": 1.0}, unit="bits")
    with pytest.raises(ValueError, match="want each row once, got 'a' again"):
        bench.row("a", {"ours": 1.0}, unit="bits")
    with pytest.raises(ValueError, match="want figures of 'b', got none"):
        bench.row("b", {})
    with pytest.raises(ValueError, match="want a time in s, ms, us, got 'bits'"):
        bench.row("b", {"ours": Timing(1.0, 1.0, 1.0)}, unit="bits")


def test_a_figure_has_a_bar_for_each_alternative() -> None:
    bench = Bench(Results(suite="toy", command="", device={"kind": "cpu"}, versions={}))
    bench.wants("part <", 1)
    bench.row("row &", {"ours": Timing(2.0, 1.0, 4.0), "theirs": Timing(3.0, 3.0, 3.0)}, unit="s")
    bench.wants("other", 1)
    bench.row("b", {"ours": 0.0, "theirs": 30.0}, unit="GB/s")
    svg = bar_chart(bench.results)
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="12" fill="#[^"]*"/>$', svg, re.MULTILINE)]
    keys, bars = widths[:2], widths[2:]
    assert keys == [12.0, 12.0]
    # each panel has its own scale: its longest figure, quartiles included, is as long as any other's
    full = bars[3]
    assert bars == pytest.approx([full * 2 / 4, full * 3 / 4, 0.0, full], abs=0.1)
    whiskers = re.findall(r'M([\d.]+) [\d.]+L([\d.]+) [\d.]+" stroke="#000000"', svg)
    ((low, high),) = [tuple(map(float, ends)) for ends in whiskers]
    assert high - low == pytest.approx(full * 3 / 4, abs=0.2)
    for words in ("part &lt;, s", "other, GB/s", "row &amp;", ">theirs<", ">30<"):
        assert words in svg


def test_a_figure_of_nothing_or_of_negative_numbers_is_refused() -> None:
    for values in ((), (-1.0,)):
        bench = Bench(Results(suite="toy", command="", device={"kind": "cpu"}, versions={}))
        for value in values:
            bench.row("a", {"ours": value}, unit="bits")
        with pytest.raises(ValueError, match="bench plot: want rows of figures >= 0, got "):
            bar_chart(bench.results)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("tyro")
    from deepfuse.__main__ import main

    def run(*arguments: str | Path) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["deepfuse", "bench", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        main()
        return capsys.readouterr()

    def refused(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit):
            run(*arguments)
        return capsys.readouterr().err

    for suite in suites().values():
        assert suite.name in run()[0] and suite.question.split()[0] in run()[0]
    assert "want a suite out of " in refused("nothing")
    path = tmp_path / "out.json"
    run_suite("toy", json=path, folder=folder, console=Console(quiet=True))
    run("plot", path, "--out", tmp_path / "x.svg")
    assert "row b" in (tmp_path / "x.svg").read_text()
    assert refused("plot", path, "--out", tmp_path / "x.png").startswith(
        "deepfuse: bench plot: want --out to end in .svg"
    )
    assert "want a file that --json wrote, and --out FIGURE.svg" in refused("plot", path)
    missing = refused("plot", tmp_path / "no.json", "--out", tmp_path / "x.svg")
    assert missing.endswith("/no.json (No such file or directory)\n") and "Errno" not in missing
    assert "behind the word plot only" in refused("cpu", path)
    assert "want a suite with --json, --budget, got none" in refused("--json", tmp_path / "y.json", "--budget", "5")
    assert "want a suite with --only, got plot" in refused("plot", path, "--out", tmp_path / "y.svg", "--only", "a")
    assert not (tmp_path / "y.svg").exists()


def test_a_suite_is_a_script_that_needs_no_tyro(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.modules['tyro'] = None; import runpy; sys.argv = sys.argv[1:]; "
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", code, str(folder / "toy.py"), *arguments]
        environment = {"PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}:{folder}", "PATH": ""}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("--json", str(tmp_path / "out.json"), "--only", "second")
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["row b"]
    done = run("--budget", "-1")
    assert done.returncode == 1 and done.stderr == "deepfuse: bench: want --budget > 0, got -1.0\n"
