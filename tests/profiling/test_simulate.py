"""Predictions: sums of their parts, what cannot be, the command, and figures that were published."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepfuse.__main__ import main
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.device import CPU, H800
from deepfuse.ir.link import INFINIBAND_400, LOOPBACK, NVLINK_H800
from deepfuse.profiling.cluster import Cluster, sustained, sustained_link
from deepfuse.profiling.simulate import Prediction, Setup, Simulation, _Rank, by_chance, check, share_of

TINY, V3 = PRESETS["v3-tiny"](), PRESETS["v3-671b"]()
LOOP = Cluster(device=CPU, gpus_per_node=2, nvlink=LOOPBACK, network=LOOPBACK)
CLUSTER = Cluster(
    device=sustained(H800),
    gpus_per_node=8,
    nvlink=sustained_link(NVLINK_H800),
    network=sustained_link(INFINIBAND_400),
)
PREFILL = Setup(phase="prefill", sequences=4, length=64, fp8=False)


@pytest.fixture(scope="module")
def tiny() -> Simulation:
    return Simulation(TINY, LOOP)


@pytest.fixture(scope="module")
def by_ranks(tiny: Simulation) -> dict[int, Prediction]:
    found = tiny.predict_all([replace(PREFILL, expert=n) for n in (1, 2, 4, 8)])
    return {p.setup.expert: p for p in found}


def test_without_overlap_a_step_is_the_sum_of_its_parts(by_ranks: dict[int, Prediction]) -> None:
    for p in by_ranks.values():
        assert p.plans["none"] == pytest.approx(sum(p.parts.values()))
        assert p.step_seconds == min(p.plans.values()) == p.plans[p.overlap]


def test_a_rank_with_all_experts_exposes_nothing(by_ranks: dict[int, Prediction]) -> None:
    alone = by_ranks[1]
    assert list(alone.plans) == ["none"] and alone.exposed_seconds == pytest.approx(0)
    assert {"dispatch", "combine"}.isdisjoint(alone.parts)


def test_overlap_hides_no_more_than_there_is(by_ranks: dict[int, Prediction]) -> None:
    for p in (by_ranks[n] for n in (2, 4, 8)):
        travels = p.parts["dispatch"] + p.parts["combine"]
        computing = p.plans["none"] - travels
        assert max(computing, travels) <= p.step_seconds <= p.plans["none"]
        assert p.exposed_seconds == pytest.approx(p.step_seconds - computing)


def test_experts_are_shared_out_and_the_rest_is_not(by_ranks: dict[int, Prediction]) -> None:
    one_expert = 4 * 3 * TINY.hidden_size * TINY.moe_intermediate_size * 4  # 4 layers of experts
    held = [by_ranks[n].memory["weights"] for n in (1, 2, 4, 8)]
    assert [a - b for a, b in itertools.pairwise(held)] == [n * one_expert for n in (4, 2, 1)]
    assert by_ranks[1].memory["cache"] == 4 * 64 * TINY.cache_width * 4 * TINY.num_hidden_layers
    assert by_ranks[1].fits


def test_all_weights_of_the_shipped_model_are_counted(by_ranks: dict[int, Prediction]) -> None:
    # 4.8 million parameters with the module for multi-token prediction, which a step leaves out
    folder = Path(__file__).parents[2] / "models" / "v3-tiny"
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    numbers = 0
    for name, entry in header.items():
        if name != "__metadata__" and not name.startswith("model.layers.5.") and "correction_bias" not in name:
            size = 1
            for n in entry["shape"]:
                size *= n
            numbers += size
    assert by_ranks[1].memory["weights"] == 4 * numbers


def test_a_layer_by_itself_is_a_share_of_the_stack(tiny: Simulation, by_ranks: dict[int, Prediction]) -> None:
    layer = tiny.layer(replace(PREFILL, expert=2))
    parts, sparse = by_ranks[2].parts, 4
    assert sparse * layer.dispatch == pytest.approx(parts["dispatch"])
    assert sparse * sum(layer.shared) == pytest.approx(parts["shared"])
    assert sparse * sum(layer.routed) == pytest.approx(parts["routed"] + parts["permute"])
    half = tiny.layer(replace(PREFILL, expert=2), 0.5)
    # half of the rows, but the same weights and as many launches
    assert layer.compute / 2 < half.compute < layer.compute
    assert half.dispatch - LOOPBACK.latency == pytest.approx((layer.dispatch - LOOPBACK.latency) / 2)


def test_imbalance_costs_experts_and_exchange(tiny: Simulation, by_ranks: dict[int, Prediction]) -> None:
    even, uneven = by_ranks[2].parts, tiny.predict(replace(PREFILL, expert=2, imbalance=1.5)).parts
    dearer = {name for name in even if uneven[name] > even[name]}
    assert dearer == {"routed", "permute", "dispatch", "combine"}


def test_the_busiest_rank_by_chance() -> None:
    assert by_chance(1000, 1) == 1
    # rows of 704 choices a rank on average, over 144 ranks: drawn, the fullest has 1.10 times the mean; the law of many
    # balls is an upper end of that, by a tenth of the excess or two
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(144, (20, 144 * 704), generator=generator)
    fullest = torch.stack([torch.bincount(row, minlength=144).max() for row in draws]).double().mean() / 704
    assert fullest < by_chance(704, 144) < 1 + 1.25 * (fullest - 1)


def test_a_mixture_of_experts_alone_is_a_layer_without_attention(tiny: Simulation) -> None:
    setup = replace(PREFILL, expert=2)
    alone, layer = tiny.experts(setup), tiny.layer(setup)
    assert replace(alone, attention=layer.attention) == layer
    # the product of the router, the choice it makes, and what lies between
    assert 2 <= len(alone.attention) <= 3 and layer.attention[-len(alone.attention) :] == alone.attention


def test_redundant_experts_cost_memory(tiny: Simulation, by_ranks: dict[int, Prediction]) -> None:
    more = tiny.predict(replace(PREFILL, expert=2, redundant=2))
    assert more.memory["weights"] > by_ranks[2].memory["weights"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sequences": 0}, "want sequences >= 1, got 0"),
        ({"sequences": 10**12, "length": 2}, "want sequences [*] length <= 4294967296, got 1000000000000 [*] 2"),
        ({"expert": 3}, "want expert to divide n_routed_experts [+] redundant, got 3 and 8; redundant = 1 fits"),
        (
            {"expert": 3, "redundant": 1},
            "want expert ranks that fill nodes, got 3 with 2 to a node; a multiple of 2 fits",
        ),
        ({"tensor": 3}, "want tensor to divide num_attention_heads, got 3 and 8"),
        ({"tensor": 4}, "want tensor to divide the GPUs of a node, got 4 and 2"),
        ({"redundant": -1}, "want redundant >= 0 and a finite imbalance >= 1, got -1 and None"),
        ({"imbalance": 0.5}, "want redundant >= 0 and a finite imbalance >= 1, got 0 and 0.5"),
        ({"imbalance": math.nan}, "want redundant >= 0 and a finite imbalance >= 1, got 0 and nan"),
        ({"imbalance": math.inf}, "want redundant >= 0 and a finite imbalance >= 1, got 0 and inf"),
        ({"length": 1}, "want prompts of a length >= 2, got 1"),
        ({"fp8": True}, "want no FP8 on cpu, got it; quantize = none fits"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, float], error: str) -> None:
    with pytest.raises(ValueError, match=f"^simulate: {error}$"):
        check(TINY, LOOP, replace(PREFILL, **change))  # type: ignore[arg-type]


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="simulate: want a model with routed experts"):
        Simulation(replace(TINY, n_routed_experts=None), LOOP)


@pytest.fixture(scope="module")
def published() -> dict[str, Prediction]:
    """What docs/parallelism.md predicts. The overview of DeepSeek's inference system has EP144 and 32 redundant experts in
    decode; 14.8k tokens/s a node at 20 to 22 a sequence make 88 sequences a GPU, with 4989 tokens in the cache on average."""
    decode = Setup(phase="decode", sequences=88, length=4989, expert=144, redundant=32)
    prefill = Setup(phase="prefill", sequences=4, length=4096, expert=32, redundant=32)
    setups = {
        "decode, EP144": decode,
        "decode, EP320": replace(decode, expert=320, redundant=64),
        "decode, uneven": replace(decode, imbalance=1.5),
        "prefill, EP32": prefill,
        "prefill, uneven": replace(prefill, imbalance=1.5),
    }
    return dict(zip(setups, Simulation(V3, CLUSTER).predict_all([*setups.values()]), strict=True))


def test_steps_as_published(published: dict[str, Prediction]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    predicted = {name: f"{p.tokens_per_second:,.0f}" for name, p in published.items()}
    for name in ("decode, EP144", "decode, EP320", "prefill, EP32"):
        assert re.search(rf"^\| {name} \| [0-9,-]+ \| {predicted[name]} \|", text, re.MULTILINE), predicted[name]
    assert predicted["decode, uneven"] in text and predicted["prefill, uneven"] in text
    # an average of a day's service, with loads that are not equal: the prediction must be above, and not by half
    assert 1.0 < published["decode, EP144"].tokens_per_second / 14_800 < 1.5
    assert all(p.fits and p.overlap == "two-batch" for p in published.values())


def test_one_expert_a_gpu_instead_of_two(published: dict[str, Prediction]) -> None:
    two, one = (published[f"decode, EP{n}"].memory["weights"] for n in (144, 320))
    # FP8 numbers, and a scale for each 128 x 128 of them
    assert two - one == pytest.approx(58 * 3 * 7168 * 2048 * (1 + 4 / 128**2))


def test_a_training_step_sums_gradients_and_holds_an_optimizer(tiny: Simulation) -> None:
    # weights are those of any step; its graphs are in test_layer_work.py
    setup = replace(PREFILL, phase="train", data=2, expert=2)
    rank = _Rank(TINY, LOOP, setup, tiny._work(PREFILL))
    inside = rank.expert_parameters()
    assert inside == 4 * 4 * 3 * TINY.hidden_size * TINY.moe_intermediate_size
    assert rank.parameters() * 4 == rank.weights()
    # experts differ between expert ranks, so that only data ranks sum theirs
    shared = rank.parameters() - inside
    assert rank.gradient_sums() == LOOP.all_reduce(4 * shared, 4) + LOOP.all_reduce(4 * inside, 2)
    assert rank.memory()["weights and optimizer"] == (16 + 4) * rank.parameters()
    # gradients travel as results do, whatever tokens are sent in
    assert rank.exchanges(1.0, backward=True) == rank.exchanges(1.0, backward=False)
    in_fp8 = replace(rank, setup=replace(setup, fp8=True))
    (dispatch, combine), back = (in_fp8.exchanges(1.0, backward=b) for b in (False, True))
    assert dispatch < combine and back == (combine, combine)


def test_tensor_ranks_sum_what_they_add(tiny: Simulation) -> None:
    ranks = [_Rank(TINY, LOOP, replace(PREFILL, tensor=n), tiny._work(PREFILL)) for n in (1, 2)]
    size = 4 * 64 * TINY.hidden_size * 4
    assert [rank.tensor_sums() for rank in ranks] == [0, 2 * 5 * LOOP.all_reduce(size, 2)]


def test_the_share_of_a_tensor_rank() -> None:
    share = share_of(V3, 4)
    assert (share.num_attention_heads, share.intermediate_size, share.moe_intermediate_size) == (32, 4608, 512)
    assert share.n_routed_experts == 256 and share.kv_lora_rank == 512


def test_the_command_prints_and_draws(
    tiny: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Simulation, "_work", lambda self, setup, kept=tiny._work: kept(setup))  # captured already

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["deepfuse", "simulate", "v3-tiny", *arguments])
        main()
        return capsys.readouterr().out

    (tmp_path / "rates.json").write_text('{"network": {"bandwidth": 1e6, "latency": 1e-3}}')
    shared = [
        *("--device", "cpu", "--quantize", "none", "--phase", "prefill", "--sequences", "4", "--length", "64"),
        *("--gpus-per-node", "1", "--network", "1,50"),
    ]
    found = json.loads(run(*shared, "--expert", "2", "4", "--json", "--plot", str(tmp_path / "a.svg")))["predictions"]
    assert [p["setup"]["expert"] for p in found] == [2, 4]
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    text = run(*shared, "--expert", "2", "--calibration", str(tmp_path / "rates.json"))
    assert "dispatch" in text and "two-batch" in text and "weights" in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--device", "H900"], "want a device out of H100, H800, H200, B200, cpu, got 'H900'"),
        (["--network", "fast"], "want --network out of NVLink H100, .*, or GB/S,MICROSECONDS, got 'fast'"),
        (["--network", "0,1"], "link network: want a bandwidth > 0"),
        (["--plot", "a.png"], "want --plot to be an .svg in a folder that exists, got a.png"),
        (["--network", "nan,1"], "link network: want a bandwidth > 0"),
        (["--gpus-per-node", "0"], "cluster: want gpus_per_node >= 1, got 0"),
        (
            ["--calibration", "nowhere.json"],
            "calibration nowhere.json: want a file of measured rates, got No such file",
        ),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deepfuse", "simulate", "v3-671b", *arguments])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(error, line), line
