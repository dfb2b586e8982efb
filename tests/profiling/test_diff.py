"""Two runs made by hand, compared."""

import json

import pytest

from deepfuse.__main__ import main
from deepfuse.passes.sites import Site
from deepfuse.profiling.diff import compare, difference_table
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Span, Step


def run(times, device="cpu", graph="decode_1"):
    """Op -> microseconds of each step."""
    made = Run(model="m", dtype="float32", device=device, threads=1, torch="2", date="2026-01-01")
    sites = [Site(i, f"layers.0.{op}", op) for i, op in enumerate(times)]
    made.parts[graph] = [[Part(f"cpp_fused_{s.op}", (s,), ())] for s in sites]
    for of_step in zip(*times.values(), strict=True):
        spans, now = [], 0
        for kernel, us in enumerate(of_step):
            spans.append(Span(kernel, 0, now, now + us * 1000))
            now += us * 1000
        made.steps.append(Step(graph, 0, now, 0, now, spans, {}))
    return made


def changes(before, after):
    return {row.name: row.change for row in compare(run(before), run(after))}


def test_faster_and_slower():
    found = changes(
        {"linear": [50, 51, 52, 53], "route": [9, 9, 9, 9], "swiglu": [5, 6, 7, 8]},
        {"linear": [40, 41, 42, 43], "route": [19, 19, 19, 19], "swiglu": [6, 7, 8, 9]},
    )
    assert found == {"linear": "faster", "route": "slower", "swiglu": "same", "(wrapper)": "same", "(guards)": "same"}


def test_a_step_that_was_interrupted_is_no_change():
    steady = [10, 10, 10, 10, 10, 10, 10, 10]
    assert changes({"linear": steady}, {"linear": [10, 10, 10, 900, 10, 10, 10, 10]})["linear"] == "same"


def test_appeared_and_vanished():
    before, after = {"mla_attention": [30, 31], "linear": [5, 5]}, {"mla_decode": [8, 9], "linear": [5, 5]}
    rows = compare(run(before), run(after))
    assert [(r.name, r.before_us, r.after_us, r.change) for r in rows[:2]] == [
        ("mla_attention", 30.5, None, "vanished"),
        ("mla_decode", None, 8.5, "appeared"),
    ]
    assert rows[0].us == -30.5 and rows[1].us == 8.5
    assert {row.change for row in rows[2:]} == {"same"}


def test_by_place():
    rows = compare(run({"linear": [5]}), run({"linear": [9]}), "place")
    assert (rows[0].name, rows[0].change) == ("layers.0.linear.linear", "slower")


def test_the_table_has_what_changed():
    rows = compare(run({"a": [5], "b": [7], "c": [3]}), run({"a": [9], "b": [1], "c": [3]}))
    cells = [list(column.cells) for column in difference_table(rows).columns]
    assert cells[1] == ["b", "a", "(3 rows)"] and cells[4] == ["-6.0", "+4.0", "+0.0"]
    assert cells[5] == ["faster", "slower", "same"]
    cells = [list(column.cells) for column in difference_table(rows, most=1).columns]
    assert cells[1] == ["b", "(1 more)", "(3 rows)"] and cells[4] == ["-6.0", "+4.0", "+0.0"]


def test_runs_of_different_devices():
    with pytest.raises(ValueError, match="diff: want two runs of one device, got cpu with 1 threads and gpu with 1"):
        compare(run({"a": [5]}), run({"a": [5]}, device="gpu"))


def test_runs_of_different_graphs():
    with pytest.raises(
        ValueError, match=r"diff: want runs with a graph in common, got \['decode_1'\] and \['prefill'\]"
    ):
        compare(run({"a": [5]}), run({"a": [5]}, graph="prefill"))


def test_a_graph_that_only_one_run_has():
    one, both = run({"a": [5]}), run({"a": [5]})
    more = run({"b": [7]}, graph="decode_2")
    both.parts |= more.parts
    both.steps += more.steps
    found = {(row.graph, row.name): row.change for row in compare(one, both)}
    assert found["decode_2", "b"] == "appeared" and found["decode_1", "a"] == "same"
    assert {row.change for row in compare(both, one) if row.graph == "decode_2"} == {"vanished"}


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """``deepfuse profile ...`` with runs in the directories a and b; what it prints, and its error."""
    for name, us in (("a", 5), ("b", 9)):
        (tmp_path / name).mkdir()
        run({"linear": [us]}).write(tmp_path / name / "run.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["deepfuse", "profile", *arguments])
        main()
        return capsys.readouterr().out

    return call


def test_the_command(command):
    assert "slower" in command("diff", "a", "b")
    rows = json.loads(command("diff", "b", "a", "--by", "block", "--json"))
    assert [rows[0][name] for name in ("name", "change", "us")] == ["layers.0.linear", "faster", -4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diff", "a"), "profile diff: want two run directories, got 1"),
        (("diff", "a", "b", "a"), "profile diff: want two run directories, got 3"),
        (
            ("diff", "a", "b", "--steps", "3", "--seq-len", "9"),
            "profile diff: want directories without options of a pro",
        ),
        (("open", "a", "--json"), "options of a profile, got --json"),
        (("v3-tiny", "--prompt", "a", "--no-compile"), "got --no-compile"),
        (("diff", "a", "c"), "run: want a directory that profile wrote, got c"),
        (("v3-tiny", "a"), "profile: want one model, got v3-tiny and a"),
        # before the model is looked for
        (("no", "--train", "--nvtx", "--out", "c"), "profile: want --train with --out or with --nvtx, got both"),
        (
            ("no", "--prompt", "a", "--seq-len", "9"),
            "profile: want --train with --text, --batch-size and --seq-len, got --seq-len",
        ),
    ],
)
def test_what_the_command_refuses(command, capsys, arguments, message):
    with pytest.raises(SystemExit):
        command(*arguments)
    assert message in capsys.readouterr().err
