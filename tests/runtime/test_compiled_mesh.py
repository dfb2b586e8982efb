"""Models and trainers compiled by Inductor over a mesh of two processes, which are started once, against one process."""

import json
from typing import Any

import pytest
import torch

import compiled_mesh_worker
import deepfuse as df
from compiled_mesh_worker import IN_HALVES, PROMPTS, TWO_LAYERS
from mesh_worker import train
from ranks import run_ranks
from tiny_model import checkpoint, tiny_model

pytestmark = pytest.mark.compile
TOLERANCE = 1e-5
"""Of float32: sums over up to 64 numbers in another order, 64 * 2 ** -24 = 4e-6 of their size, over a few layers."""
BUILT = ["nodes", "cold", "warm beside cold", "warm"]
GRAPHS = ["prefill", "decode_1"]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process said of each case."""
    folder = tmp_path_factory.mktemp("compiled_mesh")
    alone = df.build(TWO_LAYERS, device="cpu", compile=False, training=IN_HALVES, seed=1)
    torch.save(train(alone, graphs=False, many=2), folder / "steps.pt")
    run_ranks(compiled_mesh_worker.__file__, 2, folder, str(checkpoint()), str(folder / "steps.pt"), timeout_s=900)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", BUILT)
def test_a_compiled_model_says_what_one_process_would(said: list[dict[str, Any]], case: str) -> None:
    model = tiny_model()
    for prompt, words in zip(PROMPTS, (process[case] for process in said), strict=True):
        assert words["compiled"] and words["graphs"] == GRAPHS
        torch.testing.assert_close(
            torch.tensor(words["scores"]), model.score([prompt])[0], rtol=TOLERANCE, atol=TOLERANCE
        )
        assert words["greedy"] == model.generate([prompt], max_new_tokens=4, temperature=0.0, stop_token_ids=[])


def test_all_to_alls_are_those_of_the_mode(said: list[dict[str, Any]]) -> None:
    # counts, rows and results; over nodes 5, as tests/runtime/test_mesh.py says, and 3 in the node
    for words in said:
        for name in GRAPHS:
            assert words["cold"]["collectives"][name] == {"all_to_all_single": 3}
            assert words["nodes"]["collectives"][name] == {"all_to_all_single": 5 + 3}


def test_a_process_without_its_cache_compiles_beside_one_that_reads_its_own(said: list[dict[str, Any]]) -> None:
    """Each of two has a cache, and that of the last is gone before the second build."""
    first, last = ([(p[case]["warm"], p[case]["from cache"]) for case in BUILT] for p in said)
    assert first == [(False, 0), (False, 0), (True, 2), (True, 2)]
    assert last == [(False, 0), (False, 0), (False, 0), (True, 2)]
    # the same code, or the same once more
    for process in said:
        for case in ("warm beside cold", "warm"):
            assert process[case]["scores"] == process["cold"]["scores"]
            assert process[case]["collectives"] == process["cold"]["collectives"]


def test_steps_in_halves_are_those_of_one_process_with_the_whole_batch(said: list[dict[str, Any]]) -> None:
    for words in (process["halves"] for process in said):
        assert words["compiled"] and words["graphs"] == ["train"]
        for step, errors in enumerate(words["errors"]):
            # each step's gradients are of weights that the steps before have changed
            assert {n: e for n, e in errors.items() if not e <= (1 + step) * TOLERANCE} == {}
            assert {"losses", "model.layers.1.mlp.gate.e_score_correction_bias"} < errors.keys() and len(errors) > 20
        assert len(words["errors"]) == 2
        # of each half rows and results; the backward graph's are told
        assert words["all-to-alls back"] == 2 * 2
