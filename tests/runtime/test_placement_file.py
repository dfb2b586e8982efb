"""Loads and placements as files: what is written is read, and what is neither is refused."""

import json
import re

import pytest
import torch

from deepfuse.runtime.placement import place_experts
from deepfuse.runtime.placement_file import load_loads, load_placement, save_loads, save_placement

LOADS = torch.tensor([[90, 20, 10, 40], [1, 1, 1, 2]])


def test_what_is_written_is_read(tmp_path):
    placement = place_experts(LOADS, 2, redundant=2)
    save_loads(LOADS, tmp_path / "loads.json")
    save_placement(placement, tmp_path / "plan.json")
    assert torch.equal(load_loads(tmp_path / "loads.json"), LOADS)
    read = load_placement(str(tmp_path / "plan.json"))
    assert read == placement and repr(read) == repr(placement)
    assert torch.equal(read.loads, placement.loads) and torch.equal(read.after, placement.after)
    # a name stands for what is in the file
    assert place_experts(tmp_path / "loads.json", 2, redundant=2) == placement
    assert (tmp_path / "plan.json").read_text().startswith('{\n"ranks": 2,\n"expert_of_slot": [\n[')


ROWS = [[0, 1, 2, 0], [2, 1, 0, 2]]
PLAN = {"ranks": 2, "expert_of_slot": ROWS, "loads": [[1, 2, 3], [1.0, 1.0, 1.0]]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "want JSON in {path}, got Expecting property name"),
        ("[1]", "want an object of ['expert_of_slot', 'loads', 'ranks'] in {path}, got a list; save_placement("),
        ({"tokens_per_expert": [[1]]}, "got ['tokens_per_expert']; save_placement(place_experts(...), path) writes it"),
        ({**PLAN, "expert_of_slot": [[0, 1], [2]]}, "want expert_of_slot in {path} as equally long lists of numbers"),
        ({**PLAN, "loads": [["a"]]}, "want loads in {path} as equally long lists of numbers, one for each layer"),
        ({**PLAN, "loads": [[10**30, 1, 1]] * 2}, "want loads in {path} as equally long lists of numbers"),
        ({**PLAN, "loads": [[1, 2, -3]] * 2}, "want finite loads >= 0 [layers, experts], got (2, 3) from -3.0"),
        ({**PLAN, "loads": [[1, 2, float("nan")]] * 2}, "want finite loads >= 0"),
        ({**PLAN, "loads": [[1, 2, float("inf")]] * 2}, "want finite loads >= 0"),
        (
            {**PLAN, "loads": [[1, 2, 3]]},
            "want expert_of_slot [1, slots] int64, with the layers of the loads, got [2, 4]",
        ),
        ({**PLAN, "expert_of_slot": [[0.5, 1, 2, 0]] * 2}, "want expert_of_slot [2, slots] int64"),
        ({**PLAN, "expert_of_slot": 3}, "want expert_of_slot [2, slots] int64"),
        ({**PLAN, "expert_of_slot": [[0, 1, 2], [0, 1, 2]]}, "want ranks that divide the 3 slots of a layer, got 2"),
        ({**PLAN, "ranks": "2"}, "got '2'"),
        ({**PLAN, "expert_of_slot": [[0, 1, 2, 0], [2, 1, 1, 2]]}, "a slot for each, got none for expert 0 in layer 1"),
        (
            {**PLAN, "expert_of_slot": [[0, 1, 2, 3]] * 2},
            "want slots for the experts 0 .. 2 and a slot for each, got expert 3",
        ),
    ],
)
def test_a_file_that_holds_no_placement_is_refused(tmp_path, text, words):
    path = tmp_path / "plan.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=f"^placement: .*{re.escape(words.replace('{path}', repr(str(path))))}"):
        load_placement(path)


def test_a_file_that_holds_no_loads_is_refused(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(PLAN))
    with pytest.raises(
        ValueError, match=r"want an object of \['tokens_per_expert'\] in .*; Model.expert_loads\(path\) writes"
    ):
        place_experts(path, 2)
    path.write_text('{"tokens_per_expert": [[1, -1]]}')
    with pytest.raises(ValueError, match=r"want finite loads >= 0 \[layers, experts\], got \(1, 2\) from -1"):
        place_experts(path, 2)
    for call, writer in ((load_loads, "Model.expert_loads"), (load_placement, "save_placement")):
        with pytest.raises(FileNotFoundError, match=rf"^placement: want a file, got .*/none.json', .*; {writer}\("):
            call(tmp_path / "none.json")
    with pytest.raises(ValueError, match="^placement: want JSON in .*, got .*directory"):
        load_placement(tmp_path)
