"""What Inductor makes of a mesh of two processes, against one process: experts in slots on two nodes, and training in two halves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_mesh_worker
import deepfuse as df
from compiled_mesh_worker import LAYER, PROMPTS, TRAINING, steps_of
from deepfuse.runtime.losses import next_token_loss
from ranks import run_ranks
from tiny_model import build, write_checkpoint

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
"""Of float32: sums over up to 64 numbers in another order, 64 * 2 ** -24 = 4e-6 of their size, over a few layers."""
BUILDS = ["cold", "warm", "of one alone"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), config=LAYER)


@pytest.fixture(scope="module")
def said(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each process."""
    trainer = df.build(LAYER, device="cpu", compile=False, training=TRAINING, seed=1)
    trainer.next_token_loss = next_token_loss
    folder = tmp_path_factory.mktemp("compiled")
    torch.save(steps_of(trainer), folder / "steps.pt")
    run_ranks(compiled_mesh_worker.__file__, 2, folder, str(checkpoint), str(folder / "steps.pt"), timeout_s=600)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", BUILDS)
def test_a_compiled_model_over_nodes_with_experts_in_slots_says_what_one_process_would(said, checkpoint, name):
    alone = build(checkpoint)
    for own, words in zip(PROMPTS, (process[name] for process in said), strict=True):
        want = alone(torch.tensor([own]), last_only=True)[0]
        torch.testing.assert_close(torch.tensor(words["logits"]), want, rtol=TOLERANCE, atol=TOLERANCE)
        assert words["greedy"] == alone.generate([own], max_new_tokens=6, temperature=0.0, stop_token_ids=[])[0]
        assert "on 2 nodes" in words["report"] and "5 of 10 slots for 8 experts" in words["report"]


def test_all_read_their_graphs_or_all_make_them(said):
    # the second build in a process has the groups of the first; where one has lost its graphs, all make theirs again
    assert [[process[name]["warm"] for name in BUILDS] for process in said] == [[False, True, False]] * 2


def test_compiled_steps_in_two_halves_are_those_of_one_process(said):
    for words in (process["trained"] for process in said):
        # counts, dispatch and combine of each half, and gradients of the last two
        assert "in the code: 6 transfers" in words["overlap"] and "in the code: 4 transfers" in words["overlap"]
        for step, errors in enumerate(words["errors"]):
            assert len(errors) > 10
            # each step's gradients are of weights that the step before has changed
            assert {n: e for n, e in errors.items() if not e <= (1 + step) * TOLERANCE} == {}
