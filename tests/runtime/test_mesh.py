"""Models built and trained over meshes of 2 and 4 processes, against one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deepfuse as df
import mesh_worker
from mesh_worker import CORPUS, LONG, TRAINED, TRAINING, WIDE, prompts_of, texts_of, train
from ranks import run_ranks
from tiny_checkpoint import assert_same_state, load
from tiny_model import checkpoint, tiny_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
"""Of float32: sums over up to 64 numbers in another order, 64 * 2 ** -24 = 4e-6 of their size, over a few layers."""
OF_TWO = [
    "tensor=2 model trainer",
    "expert=2 model batches trainer",
    "expert=2 model capacity",
    "expert=2 trainer halves",
    "data=2 trainer graphs",
    "expert=2 large",
]
OF_FOUR = ["tensor=2,expert=2 model trainer", "data=2,expert=2 trainer"]
CASES = [(2, case) for case in OF_TWO] + [(4, case) for case in OF_FOUR]
MODELS = [case for case in CASES if " model" in case[1]]
TRAINERS = [case for case in CASES if " trainer" in case[1]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Steps of one process with the whole batch, in a file; its loss afterwards."""
    trainer = df.build(TRAINED, device="cpu", compile=False, training=TRAINING, seed=1)
    path = tmp_path_factory.mktemp("reference") / "steps.pt"
    torch.save(train(trainer, graphs=False), path)
    return path, trainer.evaluate(CORPUS[:50])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {size: tmp_path_factory.mktemp(f"mesh{size}") for size in (2, 4)}


@pytest.fixture(scope="module")
def said(folders: dict[int, Path], reference: tuple[Path, float]) -> dict[int, list[dict[str, Any]]]:
    """Number of processes -> what each said of each case."""
    out = {}
    for size, cases in ((2, OF_TWO), (4, OF_FOUR)):
        folder = folders[size]
        run_ranks(mesh_worker.__file__, size, folder, str(checkpoint()), str(reference[0]), *cases)
        out[size] = [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(size)]
    return out


@pytest.mark.parametrize(("size", "case"), MODELS)
def test_a_model_says_what_one_process_would(said, size, case):
    model = tiny_model()
    for words in (process[case] for process in said[size]):
        own = prompts_of(words["token_rank"])
        for got, want in zip(words["scores"], model.score([p for p in own if len(p) > 1]), strict=True):
            torch.testing.assert_close(torch.tensor(got), want, rtol=TOLERANCE, atol=TOLERANCE)
        for prompt, got in zip(own, words["logits"], strict=False):
            want = model(torch.tensor([prompt]), last_only=True)[0]
            torch.testing.assert_close(torch.tensor(got), want, rtol=TOLERANCE, atol=TOLERANCE)
        greedy = model.generate(own, max_new_tokens=6, temperature=0.0, stop_token_ids=[])
        assert words["greedy"] == greedy
        assert words["again"] == [tokens[:2] for tokens in greedy]
        assert words["sampled"] == model.generate(
            texts_of(words["token_rank"]), max_new_tokens=4, temperature=1.0, seed=3
        )


@pytest.mark.parametrize(("size", "case"), MODELS)
def test_the_report_says_which_part_of_the_model_a_process_has(said, size, case):
    sizes = case.partition(" ")[0].replace("=", " ").replace(",", " x ")
    total = sum(p.numel() for p in tiny_model().engine.model.parameters())
    for rank, words in enumerate(process[case] for process in said[size]):
        assert f"{sizes}, this is rank {rank} of {size}" in words["report"]
        assert ("experts 4-7 of 8" in words["report"]) == ("expert" in case and rank % 2 == 1)
        assert words["parameters"] < 0.9 * total
        assert words["drops"][0] == 0
        # under two choices a token, those of padding as well
        assert (words["drops"][1] > 100) == ("capacity" in case)


def test_prefills_of_many_tokens_have_a_graph_in_chunks_on_every_process(said):
    words = [process["expert=2 large"] for process in said[2]]
    assert words[0]["large"] == words[1]["large"] and words[0]["explained"] == words[1]["explained"]
    (chunks, least), graphs = words[0]["large"], ["prefill", "prefill_large", "decode_1"]
    assert chunks > 1 and 40 < least <= 150 and words[0]["graphs"] == graphs
    # 150 tokens of one process, beside 5 of the other; 40 and 30
    assert [w["called"] for w in words] == [["prefill_large", "prefill"]] * 2
    assert f"chunked x{chunks} from {least} tokens on; fewer as the model is" in words[0]["explained"]
    assert f"layers.0: chunked x{chunks}, under " in words[0]["explained"]
    alone = df.build(WIDE, device="cpu", compile=False, max_batch_size=1, max_seq_len=1024)
    for rank, process in enumerate(words):
        for i, got in enumerate(process["scores"]):
            want = alone.score([LONG[2 * i + rank]])[0]
            torch.testing.assert_close(torch.tensor(got), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_report_counts_the_collectives_of_a_call(said):
    # attention and feed-forward of two layers, and the embedding; the head's logits
    per_call = {"all_reduce": 5, "all_gather_into_tensor": 1}
    words = said[2][0]["tensor=2 model trainer"]
    assert words["collectives"] == dict.fromkeys(("prefill", "decode_1"), per_call)


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_steps_are_those_of_one_process_with_the_whole_batch(said, reference, size, case):
    for words in (process[case] for process in said[size]):
        for step, errors in enumerate(words["errors"]):
            # each step's gradients are of weights that the steps before have changed
            assert {n: e for n, e in errors.items() if not e <= (1 + step) * TOLERANCE} == {}
            assert {"loss", "model.layers.1.mlp.gate.e_score_correction_bias"} < errors.keys()
            assert len(errors) > 20
        assert words["heldout"] == pytest.approx(reference[1], abs=TOLERANCE)


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_a_process_has_its_share_of_what_is_trained(said, size, case):
    whole = df.CausalLM(TRAINED)
    total = sum(p.numel() for p in whole.parameters())
    over_tensor = "tensor" in case
    for words in (process[case] for process in said[size]):
        # over tensor, latents' projections, router and norms stay whole; else some numbers fill up the last part
        most = 0.75 * total / (size // 2) if over_tensor else 1.02 * total / size
        assert words["numbers"] <= most


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_training_goes_on_from_a_checkpoint_of_all_processes(said, size, case):
    for words in (process[case] for process in said[size]):
        assert words["resumed"]
        assert words["files"] == [*(f"part-{rank:05d}.safetensors" for rank in range(size)), "step-3", "trainer.json"]


@pytest.mark.parametrize(("size", "case"), MODELS)
def test_a_saved_model_is_the_one_that_was_loaded(said, folders, size, case):
    saved = load_file(folders[size] / case.partition(" ")[0] / "model.safetensors")
    assert_same_state(saved, load_file(checkpoint() / "model.safetensors"))


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_a_trained_model_is_saved_as_a_checkpoint(said, reference, folders, size, case):
    folder = folders[size] / ("halves" if "halves" in case else "")
    model = load(folder / f"trained {case.partition(' ')[0]}")
    loss = df.Trainer(model, TRAINING, compile=False).evaluate(CORPUS[:50])
    assert loss == pytest.approx(reference[1], abs=TOLERANCE)
