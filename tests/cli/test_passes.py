"""``deepfuse passes`` and ``deepfuse explain``."""

import json
from pathlib import Path
from typing import Any

import pytest

import deepfuse as df
from command_line import error, run


def test_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "passes")
    text = capsys.readouterr().out
    assert all(name in text for name in df.passes.default().names)
    run(monkeypatch, "passes", "--json")
    assert [row["pass"] for row in json.loads(capsys.readouterr().out)] == list(df.passes.default().names)


def test_passes_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = ["absorb_mla", "fuse_rope_append"]
    run(monkeypatch, "passes", "--json", "--without", *left_out)
    listed = [row["pass"] for row in json.loads(capsys.readouterr().out)]
    assert listed == list(df.passes.default().without(*left_out).names)
    run(
        monkeypatch,
        "passes",
        "bisect",
        'test "$DEEPFUSE_WITHOUT" = absorb_mla,lower',
        "--json",
        "--without",
        "absorb_mla",
    )
    found = json.loads(capsys.readouterr().out)
    assert found["pass"] == "lower" and all(tried["without"] != "absorb_mla" for tried in found["tried"])


def test_explain(model: df.Model, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    run(monkeypatch, "explain", "absorb_mla", folder)
    text = capsys.readouterr().out
    assert text.startswith("prefill: 0 rewrites") and "decode_1: 2 rewrites" in text
    run(monkeypatch, "explain", "absorb_mla", folder, "--json")
    assert json.loads(capsys.readouterr().out) == text.splitlines()


def test_an_unknown_pass_is_refused_before_a_build(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("deepfuse.runtime.build.build", lambda *_, **__: pytest.fail("built"))
    commands = (
        ["explain", "absorb_mal"],
        ["passes", "diff", "absorb_mal"],
        ["build", "v3-tiny", "--explain", "absorb_mal"],
    )
    for command in commands:
        assert "want a name out of absorb_mla, got 'absorb_mal'" in error(monkeypatch, capsys, *command)


def test_passes_diff(model: df.Model, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    run(monkeypatch, "passes", "diff", "absorb_mla", "--model", folder)
    text = capsys.readouterr().out
    assert text.startswith("decode_1: before absorb_mla | after absorb_mla")
    assert any("mla_attention" in line.partition(" | ")[0] for line in text.splitlines())
    run(monkeypatch, "passes", "diff", "absorb_mla", "--model", folder, "--json")
    pairs = json.loads(capsys.readouterr().out)
    assert list(pairs) == ["decode_1"] and "mla_decode" in pairs["decode_1"]["after"]
    assert "want the name of a pass, got nothing" in error(monkeypatch, capsys, "passes", "diff")
    assert "want a graph out of prefill, decode_1, got 'decode_2'" in error(
        monkeypatch, capsys, "passes", "diff", "absorb_mla", "--model", folder, "--graph-name", "decode_2"
    )


def test_passes_bisect(monkeypatch: Any, capsys: Any) -> None:
    run(monkeypatch, "passes", "bisect", 'test "$DEEPFUSE_WITHOUT" = lower', "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["pass"] == "lower" and found["tried"][0] == {"without": None, "exit status": 1}
    run(monkeypatch, "passes", "bisect", "false")
    assert capsys.readouterr().out.endswith("no single pass is to blame\n")
    assert "want a check that fails with all passes" in error(monkeypatch, capsys, "passes", "bisect", "true")
