"""Models built and trained over meshes of 2 and 4 processes, against one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deepfuse as df
import mesh_worker
from deepfuse.runtime.placement import place_experts
from mesh_worker import CORPUS, LONG, SMALL, TRAINED, TRAINING, TWO_BATCH, WIDE, in_fp8, prompts_of, texts_of, train
from ranks import run_ranks
from tiny_checkpoint import assert_same_state, load
from tiny_model import build, checkpoint, tiny_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
"""Of float32: sums over up to 64 numbers in another order, 64 * 2 ** -24 = 4e-6 of their size, over a few layers."""
TWO_BATCHES = ["expert=2 prompts halves", "expert=2 prompts bounded"]
OF_TWO = [
    "tensor=2 model trainer",
    "expert=2 model batches trainer",
    "expert=2 capacity model trainer",
    "data=2 trainer graphs",
    "expert=2 fp8",
    "tensor=2 fp8",
    "expert=2 refused rows",
    "expert=2 trainer halves",
    "expert=2 large",
    "expert=2 placed model",
    "expert=2 slots fp8",
    *TWO_BATCHES,
]
OF_FOUR = ["tensor=2,expert=2 model trainer", "data=2,expert=2 trainer", "expert=4 nodes model trainer"]
OF_FOUR += ["expert=4 homes model"]
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
        arguments = (str(checkpoint()), str(reference[0]), *cases)
        run_ranks(mesh_worker.__file__, size, folder, *arguments, timeout_s=600)
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
        nodes = " on 2 nodes" if "nodes" in case or "homes" in case else ""
        assert f"{sizes}{nodes}, this is rank {rank} of {size}" in words["report"]
        if "placed" in case or "homes" in case:
            slots = 8 + size
            assert f"{slots // size} of {slots} slots for 8 experts in each layer" in words["report"]
            assert "busiest process over the mean 1." in words["report"]
        elif "expert=4" in case:
            assert f"experts {2 * rank}-{2 * rank + 1} of 8" in words["report"]
        else:
            assert ("experts 4-7 of 8" in words["report"]) == ("expert" in case and rank % 2 == 1)
        assert words["parameters"] < 0.9 * total
        # of a layer with three choices a token, prompts and five of six that follow; none of padding
        own = prompts_of(words["token_rank"])
        tokens = sum(len(prompt) + 5 for prompt in own)
        assert words["drops"] == [0, 3 * tokens if "capacity" in case else 0]
        assert (words["choices in all"] > 0) == bool("capacity" in case and own)


def test_prefills_of_many_tokens_have_a_graph_in_chunks_on_every_process(said):
    words = [process["expert=2 large"] for process in said[2]]
    assert words[0]["large"] == words[1]["large"] and words[0]["explained"] == words[1]["explained"]
    ((chunks, least),), graphs = words[0]["large"], ["prefill", "prefill_large", "decode_1"]
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


@pytest.mark.parametrize("case", TWO_BATCHES)
def test_prompts_that_all_processes_have_in_halves_go_through_the_layers_by_turns(said, case):
    alone = df.build(SMALL, device="cpu", compile=False, max_batch_size=2, max_seq_len=64)
    for rank, words in enumerate(process[case] for process in said[2]):
        assert words["graphs"] == ["prefill", "prefill_halves", "decode_1", "decode_2"]
        # the logits of two prompts last
        assert words["called"] == ["prefill_halves", "prefill", "prefill_halves"]
        assert words["greedy"] == [alone.generate(call[rank], max_new_tokens=3, temperature=0.0) for call in TWO_BATCH]
        want = alone(torch.tensor([[5, 9, 20], [44, 2, 0]]) + rank, torch.tensor([[1, 1, 1], [1, 1, 0]]))
        torch.testing.assert_close(torch.tensor(words["logits"]), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_report_counts_the_collectives_of_a_call(said):
    # attention and feed-forward of two layers, and the embedding; the head's logits
    over_tensor = {"all_reduce": 5, "all_gather_into_tensor": 1}
    # of the layer with experts: counts, rows and results; over nodes rows to each node, with what they chose and its
    # weights, and in the node, where they are counted again, rows and results
    for size, case, per_call in (
        (2, "tensor=2 model trainer", over_tensor),
        (2, "expert=2 model batches trainer", {"all_to_all_single": 3}),
        (2, "expert=2 capacity model trainer", {"all_to_all_single": 2}),
        (4, "tensor=2,expert=2 model trainer", {**over_tensor, "all_to_all_single": 3}),
        (4, "expert=4 nodes model trainer", {"all_to_all_single": 5 + 3}),
    ):
        for words in (process[case] for process in said[size]):
            graphs = ["prefill", "decode_1", *["decode_2"] * ("batches" in case)]
            assert words["collectives"] == dict.fromkeys(graphs, per_call), case


def test_all_to_alls_over_nodes_are_hidden_by_an_order_that_all_agree_on(said):
    told = {process["expert=4 nodes model trainer"]["overlap"] for process in said[4]}
    # a process whose graph had other costs might take another order
    assert len(told) == 1 and "layers.1: under" in next(iter(told))


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_steps_are_those_of_one_process_with_the_whole_batch(said, reference, size, case):
    for words in (process[case] for process in said[size]):
        for step, errors in enumerate(words["errors"]):
            # each step's gradients are of weights that the steps before have changed
            assert {n: e for n, e in errors.items() if not e <= (1 + step) * TOLERANCE} == {}
            assert {"losses", "model.layers.1.mlp.gate.e_score_correction_bias"} < errors.keys()
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
    saved = load_file(folders[size] / f"saved {case}" / "model.safetensors")
    assert_same_state(saved, load_file(checkpoint() / "model.safetensors"))


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_a_trained_model_is_saved_as_a_checkpoint(said, reference, folders, size, case):
    model = load(folders[size] / f"trainer {case}" / "exported")
    loss = df.Trainer(model, TRAINING, compile=False).evaluate(CORPUS[:50])
    assert loss == pytest.approx(reference[1], abs=TOLERANCE)


def test_a_model_in_fp8_is_as_good_as_one_process_s(said):
    plain, one = tiny_model(), in_fp8(str(checkpoint()))
    for case in ("expert=2 fp8", "expert=2 slots fp8", "tensor=2 fp8"):
        for words in (process[case] for process in said[2]):
            own = [p for p in prompts_of(words["token_rank"]) if len(p) > 1]
            assert words["quantized"] == one.report.quantized and "fp8: " in words["quantized"]
            if not own:
                continue
            got, want = (
                torch.tensor([number for score in words["scores"] for number in score]),
                torch.cat(one.score(own)),
            )
            if "expert" in case:
                # what differs in its last bit may be rounded to the next of 2 ** 3 steps an octave
                assert float((got - want).abs().max() / want.abs().max()) <= 2**-4
                assert words["greedy"] == one.generate(own, max_new_tokens=4, temperature=0.0, stop_token_ids=[])
            else:
                # parts are not whole blocks: each has scales of its own, so other roundings, of the same size
                exact = torch.cat(plain.score(own))
                assert 0 < float((got - exact).norm()) <= 2 * float((want - exact).norm())


def test_builds_that_cannot_be_are_refused_by_every_process(said):
    for words in (process["expert=2 refused rows"] for process in said[2]):
        assert "want n_routed_experts divisible by the 2 processes of axis 'expert', got 7" in words["experts"]
        assert "want ranks_per_node that divides the 2 processes of axis 'expert', got 3" in words["nodes"]
        assert "want whole groups of experts on each of 2 nodes" in words["groups"]
        assert "parallel: " in words["not alike"] and "ranks_per_node=1" in words["not alike"]
        assert words["placed otherwise"].count("placement=Placement(8 experts in 8 slots of 2 ranks, 1 layers, ") == 2
        assert (
            "want each group of experts on one node with mode 'node_limited', got group 0 of layer 0" in words["slots"]
        )


def test_loads_are_counted_over_all_processes_and_may_be_placed(said, folders):
    one = build(checkpoint(), count_loads=True)
    for rank in range(2):
        for prompt in prompts_of(rank):
            one.generate(prompt, max_new_tokens=6, temperature=0.0, stop_token_ids=[])
    for words in (process["expert=2 placed model"] for process in said[2]):
        assert words["loads"] == one.expert_loads().tolist() and words["rows"] == 5
    loads = folders[2] / "loads.json"
    assert place_experts(loads, 2, redundant=2).loads.tolist() == words["loads"]


def test_rows_of_a_training_tell_of_what_was_dropped(said):
    first, second = (process["expert=2 refused rows"]["rows"] for process in said[2])
    # of a step 4 sequences of 8 tokens with 3 choices each; of two processes each of 8 experts takes 2 of the mean 6
    assert [row["choices"] for row in first] == [4 * 8 * 3] * 2
    assert all(4 * 8 * 3 - 2 * 8 * 2 <= row["dropped"] < 4 * 8 * 3 for row in first)
    assert [row["dropped"] for row in first] == [row["dropped"] for row in second]


@pytest.fixture(scope="module")
def one() -> df.Trainer:
    return df.build(TRAINED, device="cpu", compile=False, training=TRAINING)


@pytest.mark.parametrize(("size", "case"), TRAINERS)
def test_a_trainer_s_checkpoint_of_other_processes_is_refused(said, folders, one, size, case):
    told = [process[case]["others"] for process in said[size]]
    assert all(each == told[0] for each in told)
    cases, own = list(said[size][0]), case.partition(" ")[0]
    before = [c for c in cases[: cases.index(case)] if " trainer" in c]
    assert len(told[0]) == len([c for c in before if c.partition(" ")[0] != own])
    words = own.replace("=", " ").replace(",", " x ")
    for text in told[0]:
        assert "trainer: want the processes that" in text and f"got {words}; train over such a mesh" in text
    with pytest.raises(ValueError, match=rf"was saved over, {words}, got one process; train over such a mesh"):
        one.resume(folders[size] / f"trainer {case}")
