"""``deepfuse generate`` and ``deepfuse chat``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deepfuse as df
from command_line import error, run

NEW = ["--max-new-tokens", "12"]


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


@pytest.mark.usefixtures("model")
def test_a_prompt_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(monkeypatch, capsys, "generate", folder, "--no-compile", "--json", "--max-new-tokens", "1000")
    assert "want prompt + max_new_tokens <= max_seq_len = 128" in line


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
