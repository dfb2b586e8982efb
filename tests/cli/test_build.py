"""``deepfuse build``."""

import json
from pathlib import Path

import pytest

import deepfuse as df
from command_line import error, run


def test_build(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "build", folder, "--no-compile", "--device", "cpu", "--without", "absorb_mla", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "cpu" and report["dtype"] == "float32" and not report["compiled"]
    assert [g["name"] for g in report["graphs"]] == ["prefill", "decode_1"]
    assert [p["name"] for p in report["graphs"][0]["passes"]] == [
        n for n in df.passes.default().names if n != "absorb_mla"
    ]
    assert report["graph_breaks"] == report["recompiles"] == 0


def test_what_a_build_did(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "build", folder, "--no-compile")
    assert capsys.readouterr().out == f"{model.report}\n"
    run(monkeypatch, "build", folder, "--no-compile", "--explain", "absorb_mla")
    assert capsys.readouterr().out == model.explain("absorb_mla") + "\n"
    run(monkeypatch, "build", folder, "--no-compile", "--graph", "before:absorb_mla", "--graph-name", "decode_1")
    assert "torch.ops.deepfuse.mla_attention" not in capsys.readouterr().out.partition("def forward")[0]
    line = error(monkeypatch, capsys, "build", folder, "--no-compile", "--graph", "after:nothing")
    assert "before:absorb_mla" in line and "got 'after:nothing'" in line
    line = error(monkeypatch, capsys, "build", folder, "--no-compile", "--explain", "nothing")
    assert "want a name out of" in line
    assert "want --json, which prints the report, without" in error(
        monkeypatch, capsys, "build", folder, "--no-compile", "--json", "--explain", "absorb_mla"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--without", "absorb"], "passes: want a name out of absorb_mla, got 'absorb'"),
        (["--without", "lower", "xyz"], "overlap_all_to_all, lower, got 'xyz'"),
        (["--providers", "rms_norm"], "--providers: want op=provider, got 'rms_norm'"),
        (["--providers", "rms_norm=nothing"], "build: want a provider of rms_norm out of reference, "),
        (["--providers", "nothing=reference"], "build: want providers for ops out of absorb_query, "),
        (["--device", "nothing"], "build: want device 'auto', 'cpu' or 'cuda[:i]', got 'nothing'"),
        (["--dtype", "int8"], "build: want dtype 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (
            ["--max-seq-len", "1000"],
            "build: want max_seq_len as an integer in 1 .. max_position_embeddings = 128, got 1000",
        ),
    ],
)
def test_options_that_cannot_be(
    options: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in error(monkeypatch, capsys, "build", folder, "--no-compile", *options)


def test_a_checkpoint_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(monkeypatch, capsys, "generate", tmp_path / "nowhere", "--prompt", "x", "--no-compile")
    assert "want a checkpoint directory or a preset out of v3-tiny, v2-lite, v2, v3-671b" in line
    assert f"got '{tmp_path / 'nowhere'}'" in line
    assert "want a config.json, got none" in error(monkeypatch, capsys, "build", tmp_path, "--no-compile")


def test_the_cache_may_be_in_fp8(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "build", folder, "--device", "cpu", "--no-compile", "--cache-dtype", "fp8", "--json")
    assert json.loads(capsys.readouterr().out)["cache_dtype"] == "fp8"
