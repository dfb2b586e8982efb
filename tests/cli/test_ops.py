"""``deepfuse ops``."""

import json

import pytest

import deepfuse as df
from command_line import error, run


def test_ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "ops")
    text = capsys.readouterr().out
    assert all(name in text for name in df.OPS)
    run(monkeypatch, "ops", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in rows] == sorted(df.OPS)
    assert all("reference" in row["providers"] and row["cpu"] in row["providers"] for row in rows)
    run(monkeypatch, "ops", "--json", "--device", "cuda")
    assert all(row["cuda"] in row["providers"] for row in json.loads(capsys.readouterr().out))


def test_one_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "ops", "rms_norm")
    text = capsys.readouterr().out
    assert "deepfuse::rms_norm(" in text and "rms_norm.py" in text
    run(monkeypatch, "ops", "rms_norm", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == df.OPS["rms_norm"].schema
    assert set(facts["providers"]) == {p.name for p in df.OPS["rms_norm"].providers}


def test_an_op_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = error(monkeypatch, capsys, "ops", "nothing")
    assert f"want an op out of {', '.join(sorted(df.OPS))}, got 'nothing'" in line


def test_an_unknown_kind_of_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "deepfuse: ops: want device 'cpu' or 'cuda', got 'tpu'"
    assert error(monkeypatch, capsys, "ops", "--device", "tpu") == line
    assert error(monkeypatch, capsys, "ops", "rms_norm", "--device", "tpu") == line
