"""What is part of the key of what a build keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deepfuse as df
from deepfuse.runtime import build_key
from tiny_model import ONE_LAYER


def key_of(**changes):
    settings = {
        "pipeline": df.passes.default(),
        "providers": {},
        "config": ONE_LAYER,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "max_batch_size": 1,
        "cache": torch.float32,
        **changes,
    }
    room = {"max_batch_size": settings["max_batch_size"], "max_seq_len": 64, "cache": settings["cache"]}
    pass_settings = {"providers": settings["providers"], "device": "row", "max_seq_len": 64}
    return build_key.graph_key(
        settings["pipeline"], pass_settings, settings["config"], settings["dtype"], settings["device"], room
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": df.passes.default().without("absorb_mla")},
        {"providers": {"rms_norm": "reference"}},
        {"config": replace(ONE_LAYER, rope_theta=500.0)},
        {"dtype": torch.bfloat16},
        {"device": torch.device("cuda")},
        {"max_batch_size": 2},
        {"cache": torch.float8_e4m3fn},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_a_graph_changes_the_key(changes):
    assert key_of(**changes) != key_of()
    assert key_of() == key_of()


@pytest.mark.parametrize("block", ["attention", "axis", "collectives", "data_parallel", "message"])
def test_sources_are_part_of_the_key(monkeypatch, block):
    before = key_of()
    original = Path.read_text

    def read(path, *args, **kwargs):
        return original(path, *args, **kwargs) + ("# changed" if path.name == f"{block}.py" else "")

    monkeypatch.setattr(Path, "read_text", read)
    assert key_of() != before
