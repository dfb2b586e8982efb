"""Runs of several processes merged: clocks, tables, trace, and directories that are none."""

import gzip
import json
from dataclasses import replace

import pytest

from deepfuse.__main__ import main
from deepfuse.profiling.clock_offset import Clock, Offset
from deepfuse.profiling.rank_run import rank_folder
from deepfuse.profiling.rank_session import merge, merge_where_all_are_there
from deepfuse.profiling.ranks import Ranks
from hand_made_ranks import ALL_TO_ALL, COMBINE, GRAPH, MATMUL, REDUCE, made_run, process

MS = 1_000_000


def quick(at):
    """1 ms of shared expert under the first transfer, then 4 ms of waiting for the others."""
    return [
        ("start", at, at + 100_000),
        ("shared", at + 100_000, at + MS),
        ("wait", at + MS, at + 5 * MS),
        ("matmul", at + 5 * MS, at + 6 * MS),
        ("again", at + 6 * MS, at + 6 * MS + 100_000),
        ("wait again", at + 6 * MS + 100_000, at + 9 * MS),
    ]


def slow(at):
    """Comes to the first collective 2 ms later, and to the second 1.5 ms, both for its kernels."""
    return [
        ("matmul", at, at + 2 * MS),
        ("start", at + 2 * MS, at + 2 * MS + 100_000),
        ("wait", at + 3 * MS, at + 5 * MS),
        ("matmul", at + 5 * MS, at + 7 * MS + 500_000),
        ("again", at + 7 * MS + 500_000, at + 7 * MS + 600_000),
        ("wait again", at + 8 * MS, at + 9 * MS),
    ]


STEPS = 3


def pair(steps=STEPS):
    return {
        0: made_run(*(quick(10 * MS * i) for i in range(steps))),
        1: made_run(*(slow(10 * MS * i) for i in range(steps))),
    }


def processes(runs, **options):
    return {rank: process(rank, runs, **options) for rank in runs}


def write(folder, runs, of=processes):
    for rank, mine in of(runs).items():
        rank_folder(folder, rank).mkdir(parents=True)
        runs[rank].write(rank_folder(folder, rank) / "run.json")
        mine.write(rank_folder(folder, rank))
    return folder


def test_what_each_process_pays():
    runs = pair()
    first, second = Ranks.of(processes(runs), runs).rank_rows()
    # 0.1 of starting and 4 of waiting, and 0.1 and 2.9; the other came after 2 and after 1.5
    assert (first.rank, first.step_us, first.exposed_us, first.hidden_us) == (0, 9000, 7100, 900)
    assert first.exposed_share == pytest.approx(7.1 / 9)
    # of that, until the other had started: 0.1 and 1, and 1.5
    assert first.late_us == 100 + 1000 + 1500
    assert (second.exposed_us, second.late_us, second.hidden_us) == (100 + 2000 + 100 + 1000, 0, 0)
    assert (first.last, second.last) == (0, 2 * STEPS)


def test_what_each_collective_costs_and_who_came_last():
    runs = pair()
    rows = {row.name: row for row in Ranks.of(processes(runs), runs).collective_rows()}
    assert list(rows) == [ALL_TO_ALL, COMBINE]
    one = rows[ALL_TO_ALL]
    assert (one.graph, one.ranks, one.steps, one.bytes) == (GRAPH, (0, 1), STEPS, 512)
    assert (one.exposed_us, one.hidden_us, one.transfer_us) == ((4100 + 2100) / 2, 450, 3000)
    assert (one.last, one.last_in, one.behind_us, one.doing) == (1, STEPS, 2000, MATMUL)
    assert (rows[COMBINE].last, rows[COMBINE].behind_us, rows[COMBINE].doing) == (1, 1500, MATMUL)


def test_clocks_that_cannot_tell_name_nobody():
    runs = pair()
    # the second comes 2 and 1.5 ms late, and each clock may be 0.9 ms off
    rows = Ranks.of(processes(runs, off=0.9 * MS), runs).collective_rows()
    assert [(row.name, row.last) for row in rows] == [(ALL_TO_ALL, 1), (COMBINE, None)]


def test_tables():
    runs = pair()
    runs[0].steps[0].spans.insert(4, replace(runs[0].steps[0].spans[0], kernel=4, began=6 * MS, ended=6 * MS))
    text = str(Ranks.of(processes(runs, off=3000.0), runs))
    assert "2 processes" in text and "clocks known to 3.0 us" in text
    words = text.replace("\u2502", "").split()
    assert "78.9%" in words and " ".join(words).count("rank 1 (3 of 3) 2,000.0 layers.0.mlp.grouped_matmul") == 1
    # one that a process lacks is named, and no part of the sums
    assert f"{REDUCE} of 512 bytes in step 0 ({GRAPH}): rank 1 lacks it" in text
    table = Ranks.of(processes(runs), runs).tables(most=1)[1]
    assert list(table.columns[1].cells) == [ALL_TO_ALL, "(1 more)"]


@pytest.mark.parametrize("drift", [0.0, 2e-4])
def test_clocks_are_set_to_that_of_the_first(tmp_path, drift):
    runs = pair()
    true = Ranks.of(processes(runs), runs)
    # rank 1 began to count elsewhere, and too fast; it asked at 0 and at 1 s
    ahead = 7 * 10**15

    def own(t):
        return ahead + round(t * (1 + drift))

    def seen(step):
        times = {name: own(getattr(step, name)) for name in ("began", "ended", "code_began", "code_ended")}
        return replace(step, **times, spans=[replace(s, began=own(s.began), ended=own(s.ended)) for s in step.spans])

    skewed = {0: runs[0], 1: replace(runs[1], steps=[seen(step) for step in runs[1].steps])}
    asked = Clock(*(Offset(own(t), t - own(t), 400.0) for t in (0, 10**9)))
    folder = write(
        tmp_path / "run", skewed, lambda runs: {**processes(runs), 1: replace(process(1, runs), clock=asked)}
    )
    merged = Ranks.read(folder)
    # nanoseconds are rounded twice
    assert [row.rank for row in merged.rank_rows()] == [0, 1]
    for found, expected in ((merged.rank_rows(), true.rank_rows()), (merged.collective_rows(), true.collective_rows())):
        for a, b in zip(found, expected, strict=True):
            for name in a.__slots__:
                assert getattr(a, name) == pytest.approx(getattr(b, name), abs=0.005), name
    assert merged.processes[1].clock == asked
    for a, b in zip(merged.runs[1].steps, true.runs[1].steps, strict=True):
        times = [
            (s.began, s.ended, s.code_began, s.code_ended, *(t for x in s.spans for t in (x.began, x.ended)))
            for s in (a, b)
        ]
        assert times[0] == pytest.approx(times[1], abs=2)


def test_the_merged_trace(tmp_path):
    runs = pair(steps=1)
    merge(write(tmp_path, runs))
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "rank 0 on here", 1: "rank 1 on here"}
    begun = {(e["pid"], e["id"]): e for e in events if e["ph"] == "b"}
    ended = {(e["pid"], e["id"]): e for e in events if e["ph"] == "e"}
    assert len(begun) == 4 and begun.keys() == ended.keys()
    assert begun[0, 0]["name"] == ALL_TO_ALL and begun[1, 0]["ts"] == 2000.0 and ended[1, 0]["ts"] == 5000.0
    assert begun[0, 0]["args"]["exposed us"] == 4100.0 and begun[0, 0]["args"]["bytes"] == 512
    # an arrow from who came last to the wait that it ended
    arrows = [e for e in events if e["ph"] in "sf"]
    assert [(e["ph"], e["pid"], e["name"]) for e in arrows] == [("s", 1, MATMUL), ("f", 0, MATMUL)] * 2
    for arrow in arrows:
        slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])]
        inside = [e["name"] for e in slices if e["ts"] <= arrow["ts"] < e["ts"] + e["dur"]]
        assert inside == ["layers.0.mlp.all_to_all_single" if arrow["ph"] == "s" else "layers.0.mlp.wait_tensor"]
    kernels = [e for e in events if e["ph"] == "X" and e["cat"] == "kernels"]
    assert {e["pid"] for e in kernels} == {0, 1} and min(e["ts"] for e in kernels) == 0


def test_the_merged_json(tmp_path):
    ranks = merge(write(tmp_path, pair()))
    data = json.loads((tmp_path / "ranks.json").read_text())
    assert data == json.loads(json.dumps(ranks.json()))
    assert [p["host"] for p in data["processes"]] == ["here", "here"] and data["lacking"] == []
    assert data["ranks"][1]["last"] == 2 * STEPS and data["collectives"][0]["name"] == ALL_TO_ALL


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["deepfuse", "profile", "merge", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        main()
        return capsys.readouterr().out

    folder = write(tmp_path / "run", pair())
    table = run(folder)
    assert "collectives, the most exposed first" in table and "rank 1 (3 of 3)" in table
    assert (folder / "ranks.json").exists() and (folder / "trace.json.gz").exists()
    assert json.loads(run(folder, "--json")) == json.loads((folder / "ranks.json").read_text())
    for arguments, message in (
        ((folder, folder), "want one directory, with rank0, rank1, ... in it, got 2"),
        ((tmp_path,), "want a directory with the runs rank0, rank1, ..., got none in"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


def other_session(runs):
    return {**processes(runs), 1: process(1, runs, session="yesterday")}


def swapped(runs):
    return {0: process(1, runs), 1: process(0, runs)}


def of_three(runs):
    return {rank: process(rank, (0, 1, 2)) for rank in runs}


def with_run(rank, run):
    return lambda: {**pair(), rank: run}


@pytest.mark.parametrize(
    ("runs", "of", "message"),
    [
        (dict, processes, "want a directory with the runs rank0, rank1, ..., got none in"),
        (pair, of_three, "want the runs of ranks 0, 1, 2, got 0, 1 in .*; 2 missing"),
        (pair, other_session, "want runs of one profile, got rank 0 of session s and rank 1 of session yesterday in"),
        (pair, swapped, "want runs of one profile, got rank 1 of session s and rank 1 of session s in .*rank0"),
        (
            with_run(1, pair(2)[1]),
            processes,
            "want the same steps in every process, got 3 x decode_1 in rank 0 and 2 x decode_1 in rank 1",
        ),
        (
            with_run(1, made_run(*[slow(0)] * 3, graphs=("prefill", GRAPH, GRAPH))),
            processes,
            "got 3 x decode_1 in rank 0 and 1 x prefill, 2 x decode_1 in rank 1",
        ),
        (
            lambda: {
                0: made_run(*[slow(0)] * 3, graphs=("prefill", GRAPH, GRAPH)),
                1: made_run(*[slow(0)] * 3, graphs=("prefill", GRAPH, "decode_2")),
            },
            processes,
            "got 1 x prefill, 2 x decode_1 in rank 0 and 1 x prefill, 1 x decode_1, 1 x decode_2 in rank 1",
        ),
        (
            lambda: {
                0: made_run(*[slow(0)] * 2, graphs=("prefill", GRAPH)),
                1: made_run(*[slow(0)] * 2, graphs=(GRAPH, "prefill")),
            },
            processes,
            "in rank 1, in another order from step 0 on",
        ),
        (
            lambda: {rank: made_run([("matmul", 0, 5)]) for rank in (0, 1)},
            processes,
            "want collectives in the graphs, got none in decode_1",
        ),
    ],
)
def test_directories_that_cannot_be_merged(tmp_path, runs, of, message):
    (tmp_path / "rank-notes").write_text("")
    made = runs()
    if made:
        write(tmp_path, made, of)
    with pytest.raises(ValueError, match=f"ranks: .*{message}"):
        merge(tmp_path)
    assert not (tmp_path / "ranks.json").exists()


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"ranks": 3}'])
def test_a_damaged_run(tmp_path, content):
    path = write(tmp_path, pair()) / "rank1" / "rank.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match="ranks: want a directory that one process wrote, got .*rank1"):
        merge(tmp_path)


def test_machines_that_share_no_disk(tmp_path):
    folder = write(tmp_path / "run", pair())
    (folder / "rank1").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="copy .*rank1 here, then run: deepfuse profile merge .*run"):
        merge_where_all_are_there(folder, (0, 1))
    assert not (folder / "ranks.json").exists()
    (tmp_path / "elsewhere").rename(folder / "rank1")
    merge_where_all_are_there(folder, (0, 1))
    assert (folder / "ranks.json").exists()
