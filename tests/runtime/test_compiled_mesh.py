"""What Inductor makes of a mesh of two processes, which are started once, against one process: experts in slots on two nodes, and
training in two halves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_mesh_worker
import deepfuse as df
from compiled_mesh_worker import IN_HALVES, LAYER, PROMPTS
from mesh_worker import train
from ranks import run_ranks
from tiny_model import build, write_checkpoint

pytestmark = pytest.mark.compile
TOLERANCE = 1e-5
"""Of float32: sums over up to 64 numbers in another order, 64 * 2 ** -24 = 4e-6 of their size, over a few layers."""
BUILT = ["cold", "warm", "warm beside cold"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), config=LAYER)


@pytest.fixture(scope="module")
def said(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process said of each case."""
    folder = tmp_path_factory.mktemp("compiled_mesh")
    alone = df.build(LAYER, device="cpu", compile=False, training=IN_HALVES, seed=1)
    torch.save(train(alone, graphs=False, many=2), folder / "steps.pt")
    run_ranks(compiled_mesh_worker.__file__, 2, folder, str(checkpoint), str(folder / "steps.pt"), timeout_s=900)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", BUILT)
def test_a_compiled_model_over_nodes_with_experts_in_slots_says_what_one_process_would(said, checkpoint, case):
    alone = build(checkpoint)
    for own, words in zip(PROMPTS, (process[case] for process in said), strict=True):
        want = alone(torch.tensor([own]), last_only=True)[0]
        torch.testing.assert_close(torch.tensor(words["logits"]), want, rtol=TOLERANCE, atol=TOLERANCE)
        assert words["greedy"] == alone.generate([own], max_new_tokens=6, temperature=0.0, stop_token_ids=[])[0]
        assert "on 2 nodes" in words["report"] and "5 of 10 slots for 8 experts" in words["report"]
        # rows to each node, with what they chose and its weights, and in the node, where they are counted again
        assert words["collectives"] == {name: {"all_to_all_single": 5 + 3} for name in ("prefill", "decode_1")}


def test_a_process_without_its_cache_compiles_beside_one_that_reads_its_own(said):
    first, last = ([process[case]["warm"] for case in BUILT] for process in said)
    # the second build of a process has the process groups of the first
    assert first == [False, True, True] and last == [False, True, False]
    # the same code, or the same once more
    assert all(process[case]["logits"] == process["cold"]["logits"] for process in said for case in BUILT)


def test_compiled_steps_in_two_halves_are_those_of_one_process_with_the_whole_batch(said):
    for words in (process["halves"] for process in said):
        # counts, dispatch and combine of each half, and gradients of the last two
        assert "in the code: 6 transfers" in words["overlap"] and "in the code: 4 transfers" in words["overlap"]
        assert len(words["errors"]) == 2
        for step, errors in enumerate(words["errors"]):
            # each step's gradients are of weights that the steps before have changed
            assert {n: e for n, e in errors.items() if not e <= (1 + step) * TOLERANCE} == {}
            assert {"losses", "model.layers.0.mlp.gate.e_score_correction_bias"} < errors.keys() and len(errors) > 15
