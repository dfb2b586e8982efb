"""Builds with a placement of experts: what their report says, and which are refused. Eight processes, of which there is one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import deepfuse as df
from deepfuse.runtime.placement import place_experts
from deepfuse.runtime.placement_file import save_placement
from tiny_model import CONFIG, ONE_LAYER, build

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's Dynamo
LOADS = torch.tensor([[90, 10, 20, 40, 10, 10, 10, 10]])


@pytest.fixture
def world():
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


def built(placement, source=CONFIG, mesh=None, **options):
    # with a capacity sizes do not depend on what others say, which here is nothing
    parallel = df.Parallel(mode="capacity", placement=placement, overlap="none")
    return build(source, mesh=mesh or {"expert": 8}, parallel=parallel, max_seq_len=32, **options)


def test_the_report_has_the_balance_before_and_after_and_what_it_costs(world, tmp_path):
    placement = place_experts(LOADS, 8, redundant=8)
    save_placement(placement, tmp_path / "plan.json")
    model = built(tmp_path / "plan.json", count_loads=True)
    # 25 is the mean: experts in order give one rank 90; 30 and 20 are the most in two slots
    assert placement.before.tolist() == [3.6] and float(placement.after[0]) < 1.3
    report = model.report.placement
    assert report.before == (3.6,) and report.after == tuple(placement.after.tolist())
    # three matrices of an expert, in float32; in two slots one more than without
    assert report.redundant == 8 and report.redundant_bytes == 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 4
    assert model.report.to_json()["placement"]["redundant"] == 8
    text = " ".join(str(model.report).replace("│", " ").split())
    assert f"busiest process over the mean 3.600 -> {report.after[0]:.3f}" in text
    assert "8 redundant experts a layer, 0.01 MB of this process" in text
    assert "2 of 16 slots for 8 experts in each layer" in text
    assert model.expert_loads().tolist() == [[0] * 8]


def test_without_a_placement_the_report_has_none():
    model = build(ONE_LAYER)
    assert model.report.placement is None and model.report.to_json()["placement"] is None
    assert "placement" not in str(model.report)
    with pytest.raises(ValueError, match="^expert_loads: want a model built with count_loads=True"):
        model.expert_loads()


def test_loads_are_not_written_where_no_file_can_be(tmp_path):
    model = build(CONFIG, count_loads=True)
    for path in (tmp_path, tmp_path / "none" / "loads.json"):
        with pytest.raises(ValueError, match="^expert_loads: want path to be a file in a folder that exists, got "):
            model.expert_loads(path)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (
            {"mesh": {"tensor": 4, "data": 2}},
            ValueError,
            "build: want an axis 'expert' .*, got the mesh {'data': 2, 'ten",
        ),
        ({"mesh": {"tensor": 2, "expert": 4}}, ValueError, "placement: want one of .* over the 4 processes .* over 8"),
        ({"source": replace(CONFIG, num_hidden_layers=3)}, ValueError, "placement: want one of the model's 2 layers"),
        (
            {"training": df.Training(steps=1, batch_size=8, seq_len=8)},
            ValueError,
            r"build: want Parallel\(placement=...\) in inference alone, .*got training with Placement\(8 experts in 16",
        ),
        (
            {"placement": "nowhere.json"},
            FileNotFoundError,
            "placement: want a file, got 'nowhere.json', which does not",
        ),
        ({"placement": 3}, TypeError, "parallel: want placement as what place_experts returns, .*, got 3"),
    ],
)
def test_what_cannot_be_placed_is_refused(world, how, kind, words):
    with pytest.raises(kind, match=f"^{words}"):
        built(**{"placement": place_experts(LOADS, 8, redundant=8), **how})


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        (
            torch.nn.Linear(2, 2),
            {},
            ValueError,
            "want count_loads for a model that generates, got one to train, or anoth",
        ),
        (
            CONFIG,
            {"training": df.Training(steps=1, batch_size=1, seq_len=8)},
            ValueError,
            "want count_loads for a model",
        ),
        (ONE_LAYER, {}, ValueError, "want count_loads for a model with routed experts, got one without"),
        (CONFIG, {"count_loads": 1}, TypeError, "want count_loads as True or False, got 1"),
    ],
)
def test_where_nothing_can_be_counted_it_is_refused(source, options, kind, words):
    with pytest.raises(kind, match=f"^build: {words}"):
        df.build(source, **{"device": "cpu", "compile": False, "count_loads": True, **options})
