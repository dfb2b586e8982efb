"""The documentation is true: its code runs, and what it names is there.

A Python block behind the comment ``<!-- run -->`` is run, and so are the examples, all in one process of their own: they
define ops, and capture graphs. There ``build`` leaves Inductor out, and a checkpoint that does not exist (or is not
needed: the shipped one) stands for a model of one layer, so that the whole takes seconds.

A graph behind ``<!-- graph: STAGE -->`` is compared with that model's: each line must be in it, in this order.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deepfuse
from deepfuse.blocks.config import Config

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir())

every_text = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)


def one_layer() -> Config:
    """The model that stands for a checkpoint; the graphs in README.md are its."""
    return Config(
        vocab_size=258,
        hidden_size=96,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=256,
    )


def blocks(text: Path) -> Iterator[tuple[int, re.Match[str]]]:
    """Fenced blocks with the line they begin at."""
    content = text.read_text()
    for found in BLOCK.finditer(content):
        yield content.count("\n", 0, found.start("code")) + 1, found


def snippets() -> dict[str, str]:
    """Name -> Python code that is run."""
    found = {}
    for text in TEXTS:
        for line, block in blocks(text):
            if block["mark"] == "run":
                # line numbers in a traceback are those of the text
                found[f"{text.relative_to(ROOT)}:{line}"] = "\n" * (line - 1) + block["code"]
    return found | {str(path.relative_to(ROOT)): path.read_text() for path in EXAMPLES}


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    """What happened in the process that ran everything."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", snippets())
def test_code_runs(outcome, name):
    assert outcome["errors"][name] is None, outcome["errors"][name]


@pytest.mark.slow
@every_text
def test_graphs_are_those_of_the_model(outcome, text):
    for line, block in blocks(text):
        mark = block["mark"] or ""
        if not mark.startswith("graph: "):
            continue
        printed = iter(_shortened(outcome["graphs"][mark.removeprefix("graph: ")]))
        for wanted in block["code"].splitlines():
            # `in` reads on from the line that was found last
            assert wanted == "..." or wanted in printed, f"{text.name}:{line}: {wanted}"


def _shortened(graph: str) -> list[str]:
    """Lines of a printed graph as the documentation has them: without ``torch.ops``, and block names."""
    lines = [line.strip().replace("torch.ops.", "") for line in graph.splitlines()]
    return [re.sub(r"(  # [^ ].*?)  .*", r"\1", line) for line in lines]


@every_text
def test_links_lead_somewhere(text):
    content = text.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", content):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = text.parent / name if name else text
        assert linked.exists(), target
        assert not heading or heading in _anchors(linked.read_text()), target


def _anchors(content: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", content, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_text
def test_files_it_names_are_there(text):
    roots = "|".join(re.escape(name) for name in FOLDERS)
    for code in CODE.findall(text.read_text()):
        # `ops/<name>.py` is a pattern
        for name in re.findall(rf"(?<![\w/.<-])(?:{roots})/[\w./-]*+(?![<{{*])", code):
            assert (ROOT / name.rstrip(".")).exists(), name


@every_text
def test_is_ascii_and_names_no_address_of_a_machine(text):
    content = text.read_text()
    assert content.isascii()
    assert re.findall(r"(?:^|[\s`\"'(])/(?:home|root|work|tmp|usr|mnt)/", content) == []


@every_text
def test_commands_are_there(text):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in _command_lines(text):
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert target in targets, line


@every_text
def test_command_lines_are_understood(text):
    pytest.importorskip("tyro")
    from tyro.extras import subcommand_cli_from_dict

    from deepfuse.__main__ import COMMANDS, OmitArgPrefixes

    for line in _command_lines(text):
        words = re.findall(r'"[^"]*"|\S+', line.partition(" #")[0].partition(" |")[0])
        if words[0] != "deepfuse" or len(words) == 1 or not words[1].isalpha():
            continue
        arguments = [word.strip('"') for word in words[1:]]
        assert arguments[0] in COMMANDS, line
        if len(words) > 2:
            subcommand_cli_from_dict(COMMANDS, args=arguments, config=(OmitArgPrefixes,))


def _command_lines(text: Path) -> Iterator[str]:
    """In shell blocks, and in single quotes of code."""
    content = text.read_text()
    for _, block in blocks(text):
        if block["language"] in ("sh", "bash"):
            yield from filter(None, block["code"].splitlines())
    for code in CODE.findall(BLOCK.sub("", content)):
        if code.startswith(("deepfuse ", "make ")):
            yield code


def test_readme_names_every_command_and_every_variable():
    pytest.importorskip("tyro")
    from deepfuse.__main__ import COMMANDS

    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`deepfuse {name}" not in readme] == []
    folders = ("ir", "ops", "blocks", "passes", "runtime", "profiling", "recipes")
    sources = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    sources += (ROOT / "src" / "deepfuse").glob("*.py")
    used = {name for path in sources for name in re.findall(r"\b(?:DEEPFUSE|TRITON)_[A-Z_]+\b", path.read_text())}
    assert [name for name in sorted(used) if f"`{name}`" not in readme] == []


def test_readme_has_the_sizes_of_the_cache():
    import torch

    from deepfuse.runtime.latent_cache import gqa_bytes_per_token, latent_bytes_per_token, mha_bytes_per_token

    config, dtype = deepfuse.PRESETS["v3-671b"](), torch.bfloat16
    ours = latent_bytes_per_token(config, dtype)
    same_heads = config.num_hidden_layers * config.num_attention_heads * 2 * config.v_head_dim * dtype.itemsize
    figures = [
        f"{ours / 1000:.1f} KB",
        f"{gqa_bytes_per_token(config, dtype) / ours:.2f}",
        f"{same_heads / ours:.1f}",
        f"{mha_bytes_per_token(config, dtype) / ours:.1f}",
    ]
    readme = (ROOT / "README.md").read_text()
    assert figures == ["70.3 KB", "3.56", "56.9", "71.1"]
    assert [figure for figure in figures if figure not in readme] == []


def test_readme_has_the_tolerances():
    from deepfuse.ir.tolerance import DEFAULT_TOLERANCE

    readme = (ROOT / "README.md").read_text()
    for dtype, bounds in DEFAULT_TOLERANCE.items():
        row = f"| {str(dtype).removeprefix('torch.')} | {bounds.atol:.0e} | {bounds.rtol:.1e} |"
        assert row in readme, row


def _write_checkpoint(folder: Path) -> None:
    """The model of :func:`one_layer` with a tokenizer of single bytes and a chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from deepfuse.blocks.model import CausalLM
    from deepfuse.runtime.save import save_checkpoint

    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    model = CausalLM(one_layer())
    model.initialize()
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"bos_token": special[0], "eos_token": special[1]}).encode(),
        "generation_config.json": b'{"do_sample": true, "temperature": 0.7, "eos_token_id": 1}',
        "chat_template.jinja": b"{% for message in messages %}{{ message.content }}\n{% endfor %}",
    }
    save_checkpoint(model, folder, files=files)


def _run_all() -> dict[str, Any]:
    build = deepfuse.build
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        _write_checkpoint(folder / "checkpoint")

        built: dict[str, Any] = {}

        def quick(source: Any, **options: Any) -> Any:
            options = {"max_batch_size": 1, **options, "compile": False}
            if not isinstance(source, str | Path):
                return build(source, **options)
            if source in deepfuse.PRESETS or not Path(source).is_dir():
                source = folder / "checkpoint"
            key = f"{source} {sorted(options.items())}"
            if key not in built:
                built[key] = build(source, **options)
            return built[key]

        deepfuse.build = quick  # type: ignore[attr-defined]
        errors = {}
        for snippet, code in snippets().items():
            path = ROOT / snippet
            if ":" in snippet:
                path = folder / f"{Path(snippet).name.replace(':', '_')}.py"
                path.write_text(code)
            sys.argv = [str(path)]
            try:
                runpy.run_path(str(path), run_name="__main__")
                errors[snippet] = None
            except BaseException:  # noqa: BLE001 - also what SystemExit and pytest raise
                errors[snippet] = traceback.format_exc()
        model = quick("v3-tiny")
        os.chdir(ROOT)
    graphs = next(entry.snapshots for entry in model.report.journal.graphs if entry.name == "decode_1")
    return {"errors": errors, "graphs": graphs}


if __name__ == "__main__":
    print(f"\n{json.dumps(_run_all())}")
