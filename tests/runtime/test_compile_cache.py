"""What a build keeps on disk: used by the next, thrown away where it is damaged, shared without locks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_folder

import deepfuse as df
from deepfuse.ir.private import default_inductor_folder
from deepfuse.runtime import compile_cache
from deepfuse.runtime.compile_cache import BuildFolder, cache_root, cache_size, clear_cache, inductor_cache
from deepfuse.runtime.kept_engine import kept_journal
from tiny_model import ONE_LAYER, build, random_weights

PROMPT = [5, 6, 7]


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# the folder


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", "")
    assert cache_root() == Path.home() / ".cache" / "deepfuse"
    monkeypatch.delenv("DEEPFUSE_CACHE_DIR")
    assert cache_root() == Path.home() / ".cache" / "deepfuse"


def test_each_torch_has_its_own(root):
    assert BuildFolder("key").path == root / f"torch-{torch.__version__}" / "builds" / "key"


def test_size_and_clearing(root):
    assert cache_size() == (0, 0)
    clear_cache()
    BuildFolder("a").write("prefill.graph", b"12345")
    BuildFolder("b").write_report({})
    assert cache_size() == (2, 7)
    clear_cache()
    assert not root.exists() and cache_size() == (0, 0)


def test_clearing_leaves_what_is_not_ours(root):
    root.mkdir(exist_ok=True)
    (root / "letter.txt").write_text("kept")
    BuildFolder("a").write("prefill.graph", b"12345")
    assert cache_size() == (1, 5)
    clear_cache()
    assert [path.name for path in root.iterdir()] == ["letter.txt"]


def test_what_is_written_is_read(root):
    folder = BuildFolder("key")
    assert folder.read_report() is None
    folder.write_report({"graphs": []})
    folder.write("prefill.graph", b"old")
    folder.write("prefill.graph", b"new")
    assert BuildFolder("key").read_report() == {"graphs": []}
    assert folder.graph_path("prefill").read_bytes() == b"new"
    assert sorted(p.name for p in folder.path.iterdir()) == ["prefill.graph", "report.json"]
    folder.discard()
    folder.discard()
    assert folder.read_report() is None and not folder.path.exists()


@pytest.mark.parametrize("damage", [b"", b'{"graphs": [', b"\xff\xfe", b"null"])
def test_a_damaged_report_is_none(root, damage):
    BuildFolder("key").write("report.json", damage)
    assert BuildFolder("key").read_report() is None


def test_a_report_of_another_form_is_none():
    graph = {"name": "prefill", "passes": [], "snapshots": {}, "sites": [], "collectives": []}
    assert kept_journal({"graphs": [graph]}, 1).graphs[0].name == "prefill"
    for report in (
        None,
        [],
        {},
        {"graphs": None},
        {"graphs": [{}]},
        {"graphs": [{**graph, "passes": [{"a": 1}]}]},
        {"graphs": [{**graph, "sites": [{}]}]},
        {"graphs": [{**graph, "collectives": [["all_reduce", "0"]]}]},
    ):
        assert kept_journal(report, 1) is None, report
    # a graph is missing, or one too many
    assert kept_journal({"graphs": [graph]}, 2) is None and kept_journal({"graphs": [graph] * 2}, 1) is None


def test_a_folder_that_cannot_be_written_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path / "file"))
    folder = BuildFolder("key")
    folder.write_report({"graphs": []})
    assert folder.read_report() is None
    folder.discard()
    assert (tmp_path / "file").exists()


def test_a_full_disk_leaves_nothing_half_written(root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder = BuildFolder("key")
    folder.write("prefill.graph", b"old")
    monkeypatch.setattr(compile_cache.os, "replace", full)
    folder.write("prefill.graph", b"new")
    assert folder.graph_path("prefill").read_bytes() == b"old"
    assert [p.name for p in folder.path.iterdir()] == ["prefill.graph"]


def test_inductor_keeps_its_code_beside(root, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with inductor_cache():
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(root)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    # torch writes its default into the environment when it is first asked: that is nobody's choice
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_inductor_folder())
    with inductor_cache():
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(root)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_inductor_folder()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    with inductor_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


def test_the_default_that_torch_sets_is_no_choice_of_the_users(root, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    inductor_folder()  # as the import of Dynamo does: it sets the variable
    default = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    with inductor_cache():
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(root)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default


def test_inductor_keeps_its_own_folder_where_ours_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with inductor_cache():
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_inductor_keeps_its_own_folder_where_the_name_of_ours_would_part_its_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path / "my cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with inductor_cache():
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


# builds

TIMES = {"build_seconds", "compile_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"}


def compiled():
    return build(random_weights(ONE_LAYER), compile=True)


def story(model):
    """The report without times, which differ, and without what tells a warm build."""
    data = model.report.to_json()
    assert data["build_seconds"] > data["compile_seconds"] > 0
    return {k: v for k, v in data.items() if k not in TIMES | {"warm", "graphs_from_cache"}}


def answer(model):
    return model.generate(PROMPT, max_new_tokens=20, temperature=0.0, stop_token_ids=())


def graph_files(root):
    return {p.name: p.read_bytes() for p in root.glob("torch-*/builds/*/*")}


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A first build: its model, and the folder it filled."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPFUSE_CACHE_DIR", str(root))
        yield compiled(), root


@pytest.mark.compile
def test_a_cold_build(cold):
    model, root = cold
    assert model.report.compiled and not model.report.warm and model.report.warnings == []
    assert "(cold)" in str(model.report)
    assert sorted(graph_files(root)) == ["decode_1.graph", "prefill.graph", "report.json"]
    expected = build(random_weights(ONE_LAYER))
    assert answer(model) == answer(expected)
    torch.testing.assert_close(model(torch.tensor([PROMPT])), expected(torch.tensor([PROMPT])), atol=1e-4, rtol=0.0)


@pytest.mark.compile
def test_a_warm_build_tells_the_same(cold):
    model, root = cold
    binaries = set(root.rglob("*.so"))
    warm = compiled()
    assert binaries and set(root.rglob("*.so")) == binaries  # no C++ is compiled again, as with other flags it would be
    assert warm.report.warm and "(warm)" in str(warm.report)
    assert (model.report.graphs_from_cache, warm.report.graphs_from_cache) == (0, len(warm.report.journal.graphs))
    # times of passes are those of the build that ran them
    assert story(warm) == story(model)
    assert warm.report.journal == model.report.journal
    assert warm.graph("after:lower", "decode_1") == model.graph("after:lower", "decode_1")
    assert answer(warm) == answer(model)
    assert warm.report.compile_seconds < model.report.compile_seconds


def without_milliseconds(report):
    graphs = [{**g, "passes": [{**p, "milliseconds": 0} for p in g["passes"]]} for g in report["graphs"]]
    return {**report, "graphs": graphs}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("prefill.graph", "cut"),
        ("decode_1.graph", "flipped"),
        ("decode_1.graph", "gone"),
        ("report.json", "emptied"),
        ("report.json", "gone"),
    ],
)
def test_a_damaged_file_is_made_again(cold, name, damage):
    model, root = cold
    kept = graph_files(root)
    (file,) = root.glob(f"torch-*/builds/*/{name}")
    data = kept[name]
    if damage == "gone":
        file.unlink()
    else:
        # the first byte of a pickle says what it is
        damaged = {"cut": data[: len(data) // 2], "flipped": bytes([data[0] ^ 0xFF]) + data[1:], "emptied": b"{}"}
        file.write_bytes(damaged[damage])
    again = compiled()
    assert not again.report.warm
    assert without_milliseconds(story(again)) == without_milliseconds(story(model))
    assert answer(again) == answer(model)
    assert graph_files(root).keys() == kept.keys()
    assert compiled().report.warm


@pytest.mark.compile
def test_other_settings_do_not_share(cold):
    model, root = cold
    other = build(random_weights(ONE_LAYER), compile=True, providers={"linear": "reference"})
    assert not other.report.warm
    assert len(list(root.glob("torch-*/builds/*"))) == 2
    assert answer(other) == answer(model)
    assert compiled().report.warm


SCRIPT = """
import json, sys
import torch
from tiny_model import ONE_LAYER, build, random_weights
torch.set_num_threads(1)
model = build(random_weights(ONE_LAYER), compile=True)
tokens = model.generate([5, 6, 7], max_new_tokens=20, temperature=0.0, stop_token_ids=())
print(json.dumps({"tokens": tokens, "warm": model.report.warm, "report": model.report.to_json()}))
"""


def start(root):
    paths = [str(Path(df.__file__).parents[1]), str(Path(__file__).parents[1] / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DEEPFUSE_CACHE_DIR": str(root)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.compile
def test_processes_that_build_at_once_and_one_that_comes_later(root):
    both = [finish(process) for process in [start(root), start(root)]]
    expected = answer(build(random_weights(ONE_LAYER)))
    assert [result["tokens"] for result in both] == [expected, expected]
    files = graph_files(root)
    assert sorted(files) == ["decode_1.graph", "prefill.graph", "report.json"]
    later = finish(start(root))
    assert later["warm"] and later["tokens"] == expected
    assert graph_files(root) == files
    for key in ("graphs_at_build", "graph_breaks", "recompiles", "warnings", "parameters"):
        assert later["report"][key] == both[0]["report"][key]
