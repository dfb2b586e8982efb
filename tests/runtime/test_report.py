"""What a build says of itself: report, explanations, graphs."""

import functools
import json
from typing import Any

import pytest

from deepfuse.ir.printer import run_text
from deepfuse.runtime.report import condensed
from tiny_model import MAX_BATCH_SIZE, MAX_SEQ_LEN, build, checkpoint

FIELDS = {
    "mesh",
    "part",
    "placement",
    "dropped",
    "choices",
    "collectives",
    "model",
    "device",
    "dtype",
    "parameters",
    "active_parameters",
    "weight_bytes",
    "quantized",
    "cache_dtype",
    "cache_bytes_per_token",
    "mha_bytes_per_token",
    "compiled",
    "warm",
    "graphs_from_cache",
    "build_seconds",
    "compile_seconds",
    "graphs_at_build",
    "warnings",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "graph_breaks",
    "recompiles",
    "graphs",
}


@functools.cache
def reported() -> Any:
    """A model that no other file's tests have called, whose report is that of its build."""
    return build(checkpoint(), max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)


@pytest.mark.parametrize(
    ("notes", "rewrites", "lines"),
    [
        (["rms_norm at model.norm: matched", "rms_norm at layers.0.norm: 2 users"], 1, ["1 of 2 sites"]),
        # a pass may call a rewrite what it likes
        (["linear at a.q and a.kv: merged", "linear at b.q: apart: it has a bias"], 1, ["1 of 2 sites"]),
        (["linear at a.q and a.kv and a.z: merged"], 2, ["2 rewrites at 1 sites"]),
        (["layers.0.self_attn: absorbed", "layers.1.self_attn: absorbed"], 2, ["2 sites: absorbed"]),
        ([], 0, []),
    ],
)
def test_notes_of_one_kind_are_counted(notes: list[str], rewrites: int, lines: list[str]):
    assert condensed(notes, rewrites) == lines


def test_the_report_as_json():
    data = json.loads(json.dumps(reported().report.to_json()))
    assert set(data) == FIELDS
    weights = sum(tensor.numel() for tensor in reported().engine.model.state_dict().values())
    assert data["parameters"] == weights > data["active_parameters"] > weights // 2
    assert data["weight_bytes"] == 4 * weights
    # per layer a latent of 24 and a rotary key of 8, beside 4 heads of 20 + 10
    assert data["cache_bytes_per_token"] == 2 * 32 * 4 and data["mha_bytes_per_token"] == 2 * 120 * 4
    assert (data["device"], data["dtype"], data["compiled"]) == ("cpu", "float32", False)
    assert [graph["name"] for graph in data["graphs"]] == ["prefill", "decode_1", "decode_2", "decode_4"]
    assert data["graphs_at_build"] == 4 and data["graph_breaks"] == data["recompiles"] == 0
    assert data["build_seconds"] > data["compile_seconds"] > 0
    entry = next(p for p in data["graphs"][1]["passes"] if p["name"] == "absorb_mla")
    assert (entry["name"], entry["stage"], entry["kind"], entry["rewrites"]) == (
        "absorb_mla",
        "semantic",
        "reassociating",
        2,
    )
    assert entry["milliseconds"] > 0 and "predicted" in entry["notes"][0]
    assert entry["op_changes"]["deepfuse.mla_decode.default"] == 2


def test_the_report_as_text():
    text = str(reported().report)
    for words in (
        "absorb_mla",
        "lower",
        "decode_4",
        "4, 0 breaks, 0 recompiles",
        "256 bytes per token, 3.8x less than multi-head",
        "2 sites: absorbed",
    ):
        assert words in text, words
    assert max(len(line) for line in text.splitlines()) <= 120


def test_each_site_of_a_pass_is_explained():
    text = reported().explain("absorb_mla")
    assert "prefill: 0 rewrites" in text and "decode_4: 2 rewrites" in text
    assert "layers.1.self_attn: absorbed; predicted" in text
    with pytest.raises(ValueError, match=r"explain: want a pass out of .*absorb_mla.*, got 'absorb'"):
        reported().explain("absorb")


def test_graphs_are_python(one_layer):
    before, after = (one_layer.graph(f"{when}:absorb_mla", "decode_1") for when in ("before", "after"))
    assert "torch.ops.deepfuse.mla_attention.default(" in before and "mla_decode" not in before
    assert "torch.ops.deepfuse.mla_decode.default(" in after and "deepfuse.mla_attention" not in after
    assert callable(run_text(one_layer.graph("after:lower", "prefill")))
    assert one_layer.graph("before:lower") == one_layer.graph("before:lower", "prefill")
    with pytest.raises(
        ValueError, match=r"graph: want a stage out of \['after:absorb_mla', .* got 'after:fuse' of None"
    ):
        one_layer.graph("after:fuse")
    with pytest.raises(
        ValueError, match=r"of a graph out of \['prefill', 'decode_1'\], got 'after:lower' of 'decode_8'"
    ):
        one_layer.graph("after:lower", "decode_8")


def test_no_op_is_left_to_chance():
    """After lower, each op of the dialect is inlined or names its provider."""
    for graph in reported().report.journal.graphs:
        assert "torch.ops.deepfuse." in graph.snapshots["before:lower"]
        for line in graph.snapshots["after:lower"].splitlines():
            assert "torch.ops.deepfuse." not in line or ".default(" not in line, line


def test_graphs_name_their_blocks():
    text = reported().graph("before:lower", "decode_1")
    assert "model.layers.1.mlp" in text and "model.layers.0.self_attn" in text
