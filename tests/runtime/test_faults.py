"""Processes that die, stop, hang and disagree: what the others say of it, and how soon.

All cases run side by side, once for this file: a process spends its life waiting.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import faults_worker
from faults_worker import CASES, SETUPS, STEP, TIMEOUT_S, WORLD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-W", "ignore", faults_worker.__file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # the slowest case is over in two timeouts
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def ended(folder, case):
    """Exit code of each rank, and when it ended."""
    return {int(rank): end for rank, end in json.loads((folder / "ended.json").read_text())[case].items()}


def said(folder, case, rank):
    """The last paragraph but what an interpreter says of its own end."""
    text = (folder / case / f"log{rank}").read_text()
    return re.sub(r"nanobind: leaked.*?refleaks\.html", "", text, flags=re.DOTALL).strip()


SURVIVORS = [(case, rank) for case, (_, victim, _) in CASES.items() for rank in range(WORLD) if rank != victim]


@pytest.mark.parametrize(("case", "rank"), SURVIVORS)
def test_a_survivor_ends_in_time_and_names_rank_and_step(folder, case, rank):
    phase, victim, _ = CASES[case]
    code, at = ended(folder, case)[rank]
    text = said(folder, case, rank)
    assert code == 1, text
    # who is killed in its backward has sent all that others need of its step
    assert re.search(rf"(step {STEP} \({phase}\)|step {STEP} \(outcome\)|step {STEP + 1} \(dispatch\))", text), text
    assert re.search(rf"got: rank {victim}[ ,]", text), text
    done = folder / case / f"ended{rank}"
    at = float(done.read_text()) if done.exists() else at  # without the end of the interpreter
    assert at - float((folder / case / "when").read_text()) <= TIMEOUT_S


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("killed in dispatch", "is silent: its last beat was"),
        ("killed with the store", "which hosts the store, cannot be reached"),
        ("stopped in an endless wait", "is silent"),
        (
            "hangs in combine",
            r"lives, but has been in step 4 \(combine\) for [\d.]+ s, at .*faults_worker.py:\d+ in hang",
        ),
        (
            "hangs before a meeting",
            r"\(outcome\): want all processes within 12 s, got: rank 1 lives, but has been in .* s, at .*:\d+ in linger; see what",
        ),
        (
            "hangs while it compiles",
            r"\(outcome\): want all processes within 12 s, got: rank 1 lives, but has been in step 4 \(compile\) for [\d.]+ s, at .*:\d+ in hang; see",
        ),
        ("stopped while it compiles", "rank 2 is silent: its last beat was"),
        ("killed while it compiles", "rank 1 is silent: its last beat was"),
        ("fails in dispatch", "failed after step 4.*: ValueError: no such expert"),
        ("fails in dispatch and stays", "failed after step 4.*: ValueError: no such expert"),
    ],
)
def test_survivors_know_what_happened(folder, case, words):
    for rank in set(range(WORLD)) - {CASES[case][1]}:
        assert re.search(words, said(folder, case, rank)), said(folder, case, rank)


def test_who_hangs_ends_too(folder):
    code, _ = ended(folder, "hangs in combine")[1]
    assert code == 1
    assert "ranks 0, 2 gave up waiting for this one, rank 1" in said(folder, "hangs in combine", 1)


def test_no_checkpoint_is_partial(folder):
    checkpoint = folder / "killed in save" / "checkpoint"
    index = json.loads((checkpoint / "trainer.json").read_text())
    assert index["step"] == STEP - 1
    parts = sorted((checkpoint / index["folder"]).iterdir())
    assert [path.name for path in parts] == [f"part-{rank:05d}.safetensors" for rank in range(WORLD)]
    for path in parts:
        assert load_file(path)["weight"].eq(STEP - 1).all()


def test_who_is_at_something_that_lasts_is_waited_for(folder):
    assert [ended(folder, "slow")[rank][0] for rank in range(WORLD)] == [0] * WORLD, said(folder, "slow", 0)


DIFFER = {
    "another config": r"config.routed_scaling_factor: 2.0 in ranks 0-1; 3.0 in rank 2$",
    "another pass list": r"pass merge_projections: semantic, source \w{8} in ranks 0, 2; none in rank 1$",
    "another checkpoint": r"checkpoint model.safetensors: 88 bytes, sample \w{8} in ranks 0-1; 88 bytes, sample \w{8} in rank 2$",
}
assert DIFFER.keys() == SETUPS.keys()
TOLD = {
    **{
        case: rf"ValueError: build: want the same setup in every process, got\n.*{line}"
        for case, line in DIFFER.items()
    },
    "world size": r"ValueError: process group: want 4 processes, got 3; .*torchrun --standalone --nproc-per-node=4 .*worker.py",
    "axis": r"ValueError: mesh: want axes out of data, tensor, expert, got 'pipeline'$",
    "one fails": r"MemoryError: rank 1: want 3 GiB, got 2$",
    "all fail": r"MemoryError: want 3 GiB, got 2$",
}


@pytest.mark.parametrize("case", TOLD)
def test_all_are_refused_and_one_prints_it(folder, case):
    assert [ended(folder, case)[rank][0] for rank in range(WORLD)] == [1] * WORLD
    text = said(folder, case, 0).replace("[rank0]:", "")
    assert re.search(TOLD[case], text), text
    for rank in range(1, WORLD):
        # what torch warns of names of sockets is not ours to keep back
        lines = [
            line
            for line in said(folder, case, rank).splitlines()
            if not re.match(r"(\[rank\d\]:)?\[W.* socket\.cpp:\d+\]", line)
        ]
        assert lines == [], rank


def test_torchruns_message_suffices(tmp_path):
    folder = tmp_path / "killed in combine"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command += [faults_worker.__file__, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert re.search(r"Root Cause.*rank +: 2 .*exitcode +: -9 .*Signal 9 \(SIGKILL\)", run.stderr, re.DOTALL), (
        run.stderr
    )
