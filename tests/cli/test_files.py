"""``deepfuse quantize`` and ``deepfuse cache``."""

import json
from pathlib import Path

import pytest

import deepfuse as df
from command_line import error, run


def test_quantize(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, "quantize", folder, tmp_path / "a")
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path / 'a'}: ") and "tensors in FP8" in text
    run(monkeypatch, "quantize", folder, tmp_path / "b", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(tmp_path / "b") and 0 < facts["in_fp8"] < facts["tensors"]
    assert facts["bytes_after"] < facts["bytes_before"]
    assert df.build(tmp_path / "b", device="cpu", compile=False).generate("The", max_new_tokens=2)
    assert "got FP8 already" in error(monkeypatch, capsys, "quantize", tmp_path / "a", tmp_path / "c")
    assert "which does not exist" in error(monkeypatch, capsys, "quantize", tmp_path / "no", tmp_path / "c")
    assert "does not exist yet" in error(monkeypatch, capsys, "quantize", folder, tmp_path / "a")


def test_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    run(monkeypatch, "cache")
    assert capsys.readouterr().out == f"{tmp_path / 'cache'}: 0 files, 0.0 MB\n"
    (tmp_path / "cache" / "torch-2" / "builds").mkdir(parents=True)
    (tmp_path / "cache" / "torch-2" / "builds" / "x.graph").write_bytes(b"0" * 1_200_000)
    (tmp_path / "other").write_text("mine")
    run(monkeypatch, "cache")
    assert capsys.readouterr().out.endswith("cache: 1 files, 1.2 MB\n")
    run(monkeypatch, "cache", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path / "cache"),
        "files": 1,
        "bytes": 1_200_000,
    }
    run(monkeypatch, "cache", "--clear")
    assert capsys.readouterr().out.endswith("cache: 0 files, 0.0 MB\n")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
