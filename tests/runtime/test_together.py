"""What one process refuses, both refuse: one error each, printed once; and both can go on afterwards.

Two processes under torchrun, started once for this file.
"""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

import deepfuse as df
import together_worker
from deepfuse.runtime.process_group import VARIABLES
from together_worker import LAYER, PROMPTS, TIMEOUT_S

pytestmark = pytest.mark.slow
ORDER = "graphs: want collectives in the same order in every process, got\n  collectives of "
OF_TENSOR = "on the 2 processes of axis 'tensor', which share each token's work, got others on some of them"
LINK = "want the same setup in every process, got\n  link: Link\\(name='loopback'.* in rank 0; Link\\(name='NVLink.* in rank 1$"
REFUSED = {
    "world size": "want 4 processes, got 2; .* start it with: torchrun --standalone --nproc-per-node=4 .*together_worker.py",
    "experts": "mesh: want n_routed_experts divisible by the 2 processes of axis 'expert', got 7; choose a size",
    "capacity": "parallel: want a finite capacity_factor > 0, got 0$",
    "axis": "mesh: want axes out of data, tensor, expert, got 'pipeline'$",
    "nccl": 'want a backend for device cpu, got cpu:nccl; init_process_group\\("gloo"\\), or leave it to build$',
    "capacity of one": "^rank 1: parallel: want a finite capacity_factor > 0, got -1.0$",
    "provider of one": "^rank 1: build: want a provider of rms_norm out of .*, got 'nobody'$",
    "training": "^training: want steps >= 1, got 0$",
    "training of one": "^rank 1: training: want seq_len >= 1, got 0$",
    "passes of one": "want the same setup .*, got\n  pass absorb_mla: semantic, source \\w{8} in rank 0; none in rank 1$",
    "no mesh": "^build: want a mesh of several processes with parallel, got none; pass mesh={'expert': 2} or a DeviceMesh$",
    "parallel": "build: want parallel as a Parallel, got 'capacity'$",
    "sizes": "mesh: want at least one axis, and sizes >= 1, got {'expert': 0}$",
    "link": LINK,
    "link of a trainer": LINK,
    "order": ORDER + "prefill: 3 in the order \\w{8} in rank 0; 4 in the order \\w{8} in rank 1$",
    "order of a trainer's backward": ORDER
    + "train: 18 in the order \\w{8} in rank 0; 19 in the order \\w{8} in rank 1$",
    "prompt": "model: want token ids in 0 .. 299, got 9999 in prompt 0$",
    "options": "generate: want temperature in 0 .. 1e6, got -1.0$",
    "scored text": "model: want at least one token a prompt, got none in prompt 0$",
    "called": "model: want token ids in 0 .. 299, got 9999 in prompt 0$",
    "prompt of a stream": "model: want token ids in 0 .. 299, got 9999 in prompt 0$",
    "prompt over tensor": "model: want token ids in 0 .. 299, got 9999 in prompt 0$",
    "stop strings": f"^generate: want the same {OF_TENSOR}$",
    "a stream that one ends": f"^generate: want the same calls, of streams that are read equally far, {OF_TENSOR}$",
}
OF_ONE = ["prompt", "options", "scored text", "called", "prompt of a stream", "prompt over tensor"]
"""Cases in which the last process alone has the error."""
INTERRUPTED = ["interrupted between calls", "interrupted in a call", "interrupted over tensor"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process said of each case; and all that they printed."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command += [together_worker.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    found = [folder / f"said{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in found), done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in found], done


@pytest.mark.parametrize("case", REFUSED)
def test_all_are_refused_soon_and_one_prints_it(run: Any, case: str) -> None:
    first, last = (words[case] for words in run[0])
    assert {first["kind"], last["kind"]} == {"TypeError" if case == "parallel" else "ValueError"}, first["text"]
    for words in (first, last):
        assert re.search(REFUSED[case], words["text"], re.DOTALL), words["text"]
        assert words["seconds"] < TIMEOUT_S / 2, "it is not the wait of a collective that ends it"
    assert first["text"] == ("rank 1: " if case in OF_ONE else "") + last["text"]
    assert first["text"].splitlines()[-1] in first["printed"]
    assert last["printed"] == ""


@pytest.mark.parametrize("case", INTERRUPTED)
def test_an_interrupt_of_one_ends_both(run: Any, case: str) -> None:
    first, last = (words[case] for words in run[0])
    assert (first["kind"], first["text"]) == ("RankError", "rank 1 was interrupted (KeyboardInterrupt)")
    assert last["kind"] == "KeyboardInterrupt"
    assert max(first["seconds"], last["seconds"]) < TIMEOUT_S / 2


def test_both_go_on_afterwards(run: Any) -> None:
    for words in run[0]:
        want = words["axis of one"]["result"]
        assert len(want) == len(PROMPTS) and all(len(tokens) == 4 for tokens in want)
        for case in ("verified", "after a prompt", "after an interrupt"):
            assert words[case]["result"] == want, words[case]["text"]
        assert len(words["a stream that both end"]["result"]) == 2
    first, last = (words["after all"]["result"] for words in run[0])
    assert first == last != ""


def test_under_torchrun_the_error_is_printed_once(run: Any) -> None:
    done = run[1]
    assert done.returncode == 1
    printed = [
        line for line in done.stderr.splitlines() if "ValueError: parallel: want a finite capacity_factor" in line
    ]
    assert len(printed) == 1 and printed[0].startswith("[rank0]"), done.stderr[-3000:]
    assert "[rank1]: Traceback" not in done.stderr


def test_without_torchrun_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match="want the variables RANK, .* start it with: torchrun --standalone --nproc-per-node=6 "
    ):
        df.build(LAYER, device="cpu", mesh={"tensor": 2, "expert": 3})
