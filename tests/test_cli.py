"""The command line, run in this process."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deepfuse as df
from deepfuse.__main__ import COMMANDS, main
from deepfuse.recipes.tokenizer import train_tokenizer
from deepfuse.runtime.save import save_checkpoint
from tiny_checkpoint import TINY, model_of

DOCUMENTS = [f"The {word} of the Union in 18{n}, and {word}s--once more.\n" for n, word in enumerate("abcdef" * 9)]
NEW = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=288, num_hidden_layers=2, num_nextn_predict_layers=0)
    save_checkpoint(model_of(config), path)
    train_tokenizer(DOCUMENTS, 285).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def built(folder: Path) -> df.Model:
    return df.build(folder, device="cpu", max_batch_size=1, compile=False)


@pytest.fixture
def model(built: df.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[df.Model]:
    """The model of ``folder``, which the command line then has without building it again."""

    def build(source: str, **options: Any) -> df.Model:
        assert Path(source) == built.source and not options["compile"] and options["max_batch_size"] == 1
        return built

    monkeypatch.setattr("deepfuse.runtime.build.build", build)
    yield built
    assert built.engine.cache.free_pages == len(built.engine.cache.layers[0]) - 1


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, stdin: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["deepfuse", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    monkeypatch.setenv("COLUMNS", "200")
    main()


def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is printed as the command fails: one line."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments, stdin="Hello\n")
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("deepfuse: ")
    return lines[0]


# what there is


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, name, "--help")
        assert caught.value.code == 0


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "nothing")
    assert caught.value.code == 2
    assert "nothing" in capsys.readouterr().err


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


def test_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "passes")
    text = capsys.readouterr().out
    assert all(name in text for name in df.passes.default().names)
    run(monkeypatch, "passes", "--json")
    assert [row["pass"] for row in json.loads(capsys.readouterr().out)] == list(df.passes.default().names)


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


# a model


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


def test_generate(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = model.generate("The Union", max_new_tokens=12)
    run(monkeypatch, "generate", folder, "--prompt", "The Union", "--no-compile", *NEW)
    assert capsys.readouterr().out == f"The Union{wanted}\n"
    run(monkeypatch, "generate", folder, "--no-compile", *NEW, stdin="The Union")
    assert capsys.readouterr().out == f"The Union{wanted}\n"
    # an option's look
    wanted = model.generate("-x", max_new_tokens=12)
    run(monkeypatch, "generate", folder, "--prompt=-x", "--no-compile", *NEW)
    assert capsys.readouterr().out == f"-x{wanted}\n"


def test_generate_for_programs(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "7"]
    wanted = model.generate("The ", max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=7)
    run(monkeypatch, "generate", folder, "--prompt", "The ", "--no-compile", "--json", *NEW, *options)
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt"], result["text"]) == ("The ", wanted)
    assert result["report"]["parameters"] == model.report.parameters
    stop = wanted[2:4]
    run(monkeypatch, "generate", folder, "--prompt", "The ", "--no-compile", "--json", *NEW, *options, "--stop", stop)
    assert json.loads(capsys.readouterr().out)["text"] == wanted.partition(stop)[0]


def test_generate_with_a_report(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "generate", folder, "--prompt", "The ", "--no-compile", "--report", *NEW)
    report = capsys.readouterr().out.partition("\n\n")[2]
    assert report == f"{model.report}\n"
    assert "passes" in report and "absorb_mla" in report and "lower" in report and "tokens/s" in report


def test_an_interrupt_keeps_the_text(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*_: Any, **__: Any) -> Iterator[str]:
        yield " and"
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", generate)
    run(monkeypatch, "generate", folder, "--prompt", "The", "--no-compile")
    assert capsys.readouterr().out == "The and\n"


def test_chat(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}a:"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    monkeypatch.setattr("deepfuse.runtime.source.check_chat_template", lambda source: None)
    options: dict[str, Any] = {"max_new_tokens": 12, "stop": ["\n"]}
    hello = {"role": "user", "content": "Hello"}
    first = model.chat([hello], **options)
    answer = {"role": "assistant", "content": first}
    second = model.chat([hello, answer, {"role": "user", "content": "More"}], **options)
    run(monkeypatch, "chat", folder, "--no-compile", *NEW, "--stop", "\n", stdin="Hello\nMore\n\nno more\n")
    assert capsys.readouterr().out == f"> {first}\n> {second}\n> "
    run(monkeypatch, "chat", folder, "--no-compile")
    assert capsys.readouterr().out == "> \n"


@pytest.mark.usefixtures("model")
def test_chat_without_a_template(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(monkeypatch, capsys, "chat", folder, "--no-compile")
    assert "chat: want a model with a chat template" in line and "use generate" in line


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


@pytest.mark.usefixtures("model")
def test_a_prompt_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(monkeypatch, capsys, "generate", folder, "--no-compile", "--json", "--max-new-tokens", "1000")
    assert "want prompt + max_new_tokens <= max_seq_len = 128" in line


def test_a_checkpoint_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(monkeypatch, capsys, "generate", tmp_path / "nowhere", "--prompt", "x", "--no-compile")
    assert "want a checkpoint directory or a preset out of v3-tiny, v2-lite, v2, v3-671b" in line
    assert f"got '{tmp_path / 'nowhere'}'" in line
    assert "want a config.json, got none" in error(monkeypatch, capsys, "build", tmp_path, "--no-compile")


def test_an_unknown_kind_of_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "deepfuse: ops: want device 'cpu' or 'cuda', got 'tpu'"
    assert error(monkeypatch, capsys, "ops", "--device", "tpu") == line
    assert error(monkeypatch, capsys, "ops", "rms_norm", "--device", "tpu") == line


def test_an_interrupt_while_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepfuse.runtime.build.build", build)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "build", tmp_path)
    assert caught.value.code == 130 and capsys.readouterr().err == "deepfuse: interrupted\n"


def test_the_cache_may_be_in_fp8(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "build", folder, "--device", "cpu", "--no-compile", "--cache-dtype", "fp8", "--json")
    assert json.loads(capsys.readouterr().out)["cache_dtype"] == "fp8"


def test_a_reader_that_has_read_enough() -> None:
    # one row of a longer output, as head reads it
    command = [sys.executable, "-m", "deepfuse", "ops", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 141 and "deepfuse:" not in said and "Broken" not in said


def test_an_interrupt_ends_an_answer_and_not_the_chat(
    folder: Path, model: df.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[Any] = []

    def chat(messages: list[Any], **_: Any) -> Iterator[str]:
        heard.append(list(messages))
        yield "Well"
        if len(heard) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(model, "chat", chat)
    monkeypatch.setattr("deepfuse.runtime.source.check_chat_template", lambda source: None)
    run(monkeypatch, "chat", folder, "--no-compile", stdin="Hello\nMore\n")
    assert capsys.readouterr().out == "> Well\n> Well\n> \n"
    assert [m["content"] for m in heard[1]] == ["Hello", "Well", "More"]


def test_a_traceback_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFUSE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="want an op out of"):
        run(monkeypatch, "ops", "nothing")


# passes


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
