"""Two processes that profile together, over Gloo; started once for all tests of this file."""

import gzip
import json
from pathlib import Path

import pytest

import deepfuse as df
import rank_worker
from deepfuse.profiling.exposure import exposed_share
from deepfuse.profiling.rank_session import merge
from deepfuse.profiling.ranks import Ranks
from deepfuse.profiling.run import Run
from ranks import run_ranks

pytestmark = pytest.mark.compile
LAYER = "layers.0"
DISPATCH, COMBINE, REDUCE = (f"{LAYER}.{op}" for op in ("all_to_all_single", "all_to_all_single #2", "all_reduce"))


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """The folder the processes worked in, and what each said."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "file").write_text("")
    run_ranks(rank_worker.__file__, 2, folder, timeout_s=600)
    return folder, [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


def test_clocks_are_asked_over_the_group(worked):
    _, (first, second) = worked
    assert first["offset"] == [0.0, 0.0]
    # on one machine both have one clock, to which the last process adds
    ns, uncertainty_ns = second["offset"]
    assert abs(ns + rank_worker.AHEAD_NS) <= uncertainty_ns + 1 < 1e9


def test_the_model_computes_what_it_did(worked):
    for said in worked[1]:
        assert said["same"] and said["close"] and said["steps"] == rank_worker.STEPS


def test_each_process_has_a_run_with_its_collectives(worked):
    folder, _ = worked
    for rank in range(2):
        run = Run.read(folder / "run" / f"rank{rank}")
        assert run.graphs == ["forward"] and run.attributed() >= 0.95
        names = {part.name for kernel in run.parts["forward"] for part in kernel if part.communicates}
        assert names == {f"{LAYER}.all_to_all_single", f"{LAYER}.all_reduce", f"{LAYER}.wait_tensor"}
        # what is copied for a collective, or reduced in place, is no call of it
        computed = {
            name for kernel in run.parts["forward"] for part in kernel if not part.communicates for name in part.names
        }
        assert computed >= {
            f"{LAYER}.{name}" for name in ("norm.rms_norm", "experts.experts", "shared_experts.linear", "sum")
        }
        assert f"{LAYER}.wait_tensor" not in computed
        starts = {s.number: s for k in run.parts["forward"] for p in k if p.communicates for s in p.own if s.group}
        waits = [s for k in run.parts["forward"] for p in k if p.communicates for s in p.own if not s.group]
        assert sorted(starts[s.start].op for s in waits) == ["all_reduce", "all_to_all_single", "all_to_all_single"]
        expected = {
            "all_to_all_single": rank_worker.TOKENS * rank_worker.WIDTH * 4,
            "all_reduce": rank_worker.WIDTH * 4,
        }
        assert all(int(s.message) == expected[s.op] and s.group == "0" for s in starts.values())


def test_the_slow_experts_are_found(worked):
    folder, _ = worked
    ranks = Ranks.read(folder / "run")
    rows = {row.name: row for row in ranks.collective_rows()}
    assert set(rows) == {DISPATCH, COMBINE, REDUCE} and not ranks.lacking
    slow_us = rank_worker.SLOW_S * 1e6
    for name in (COMBINE, REDUCE):
        row = rows[name]
        # sleeping takes no less than it was told; a busy machine may add as much again
        assert (row.last, row.last_in, row.doing) == (1, rank_worker.STEPS, f"{LAYER}.experts.experts")
        assert row.behind_us > 0.5 * slow_us
    assert (rows[COMBINE].ranks, rows[COMBINE].steps) == ((0, 1), rank_worker.STEPS)
    quick, slow = ranks.rank_rows()
    # the quick process waits for the slow one nearly all of that time, and knows that it was not the link
    assert quick.late_us > 0.5 * slow_us and quick.exposed_us >= quick.late_us > 5 * slow.late_us
    assert quick.exposed_share == pytest.approx(exposed_share(ranks.runs[0], "forward"))
    assert slow.last >= 2 * rank_worker.STEPS


def test_one_trace_of_both_in_one_time(worked):
    folder, _ = worked
    events = json.loads(gzip.decompress((folder / "run" / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {e["pid"] for e in events if e["ph"] == "X"} == {0, 1}
    ends = {}
    for event in events:
        if event["ph"] == "e":
            ends.setdefault(event["id"], []).append(event["ts"])
    begins = {}
    for event in events:
        if event["ph"] == "b":
            begins.setdefault(event["id"], []).append(event["ts"])
    off_us = sum(p.clock.uncertainty_ns for p in Ranks.read(folder / "run").processes.values()) / 1e3
    assert len(begins) == 3 * rank_worker.STEPS
    for number, times in begins.items():
        # no process has the others' rows before they sent them
        assert len(times) == 2 and min(ends[number]) >= max(times) - 2 * off_us


def test_merged_again_it_is_the_same(worked):
    folder, _ = worked
    kept = json.loads((folder / "again" / "ranks.json").read_text())
    assert json.loads(json.dumps(merge(folder / "again").json())) == kept


def test_what_the_processes_are_told(worked):
    folder, both = worked
    for said in both:
        assert said["again"] is None
        assert said["alone"] == (
            "ValueError: profile: want a graph without collectives, got forward with groups 0; "
            "deepfuse.profile_ranks profiles all their processes"
        )
        assert said["there already"] == (
            "FileExistsError: profile: want a run directory that is not there yet and can be made, got "
            f"{folder}/run: File exists"
        )
        assert said["no directory"].endswith(f"can be made, got {folder}/file/run: Not a directory")
        assert said["group"] == "TypeError: profile: want group as a process group that this process is in, got str"
    assert (
        "RuntimeError: profile: want every process of 0, 1 at the beginning of its block, got "
        in both[0]["nobody else"]
    )
    # a process that fails is not waited for
    assert both[1]["failed"] == "RuntimeError: mine"
    assert "RuntimeError: profile: want every process of 0, 1 at the end of its block, got " in both[0]["failed"]


def test_a_process_alone_is_told_how_to_start_several(tmp_path: Path):
    with pytest.raises(
        ValueError, match="want processes that torch.distributed knows, got none; start them with torchrun"
    ):
        df.profile_ranks(None, tmp_path / "run").__enter__()
