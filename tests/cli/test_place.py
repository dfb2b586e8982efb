"""``deepfuse place``: from a file of loads to a file of places."""

import json
from pathlib import Path

import pytest
import torch

from command_line import error, run
from deepfuse.runtime.placement import place_experts
from deepfuse.runtime.placement_file import load_placement, save_loads

LOADS = torch.tensor([[90, 20, 10, 40, 10, 10, 20, 40], [10, 10, 20, 20, 30, 30, 40, 80]])


def test_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_loads(LOADS, tmp_path / "loads.json")
    asked = ("place", tmp_path / "loads.json", "--ranks", "4", "--redundant", "4")
    run(monkeypatch, *asked, "--out", tmp_path / "placement.json")
    want = place_experts(LOADS, 4, redundant=4)
    assert capsys.readouterr().out == f"{want}\n" and "layer 1: 2.000 -> 1.028" in str(want)
    assert torch.equal(load_placement(tmp_path / "placement.json").expert_of_slot, want.expert_of_slot)
    run(monkeypatch, *asked, "--ranks-per-node", "2", "--n-group", "4", "--json")
    by_node = place_experts(LOADS, 4, redundant=4, ranks_per_node=2, n_group=4)
    said = json.loads(capsys.readouterr().out)
    assert said["expert_of_slot"] == by_node.expert_of_slot.tolist() != want.expert_of_slot.tolist()
    assert said["after"] == by_node.after.tolist() and said["before"] == by_node.before.tolist()


def test_what_cannot_be_placed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_loads(LOADS, tmp_path / "loads.json")

    def told(*asked: str | Path) -> str:
        return error(monkeypatch, capsys, "place", *asked)

    assert "which does not exist; Model.expert_loads(path) writes it" in told(tmp_path / "no.json", "--ranks", "2")
    assert "want ranks that divide 8 experts + redundant" in told(tmp_path / "loads.json", "--ranks", "3")
    for out in (tmp_path / "a" / "b", Path("/dev/null")):
        said = told(tmp_path / "loads.json", "--ranks", "2", "--out", out)
        assert f"place: want --out to be a file in a folder that exists, got {out}" in said
    assert not Path("/dev/null").is_file()
