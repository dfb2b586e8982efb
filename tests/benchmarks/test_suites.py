"""The suites run to their end and have the rows that the documentation shows, on small models and uncompiled."""

import functools
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_device import facts
from deepfuse.profiling.bench_results import Results
from deepfuse.recipes.corpus import SEPARATOR
from deepfuse.runtime.save import save_checkpoint
from tiny_checkpoint import TINY, model_of

cpu, model, stepping = load_script("cpu"), load_script("model"), load_script("stepping")
CONFIG = replace(TINY, num_nextn_predict_layers=0)


def bench_of(suite: str) -> Bench:
    return Bench(Results(suite=suite, command="", device=facts(torch.device("cpu")), versions={}))


def committed(suite: str) -> Results:
    return Results.read(Path(cpu.__file__).parent / "results" / f"{suite}.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few thousand numbers."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    save_checkpoint(model_of(CONFIG), path)
    return path


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The suite cpu on that model, nothing compiled; which codes ran in processes."""
    ran = []

    def run_code(code: str, *arguments: str, **environment: str) -> dict[str, object]:
        ran.append(code)
        if code is cpu.BUILD:
            return {"df.build": 2.0, "warm": len(ran) > 1, "whole process": 3.0}
        imports = {f"import {name}": 1.0 for name in ("torch", "deepfuse", "transformers")}
        return {**(imports if code is cpu.IMPORT else {}), "whole process": 2.0}

    monkeypatch.setattr(cpu, "run_code", run_code)
    monkeypatch.setattr(cpu, "benchmark_config", lambda: CONFIG)
    monkeypatch.setattr(cpu, "Checkpoint", lambda beside: SimpleNamespace(folder=folder, beside=beside))
    sizes = {"CONTEXTS": (3,), "SHIPPED_CONTEXTS": (5,), "PREFILL": 12, "MAX_SEQ_LEN": 64, "SHIPPED_SEQ_LEN": 64}
    for name, value in {**sizes, "SHIPPED": folder, "DTYPES": ("float32",)}.items():
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(stepping, "LENGTH", 16)
    monkeypatch.setattr(cpu, "LLAMA_CPP", ("a_module_that_is_nowhere",))
    ours, training = functools.cache(functools.partial(cpu.Ours, compile=False)), cpu.our_training
    monkeypatch.setattr(cpu, "Ours", ours)
    monkeypatch.setattr(cpu, "our_training", lambda *args: training(*args, compile=False))
    eager, theirs = cpu.Transformers, cpu.transformers_training
    monkeypatch.setattr(cpu, "Transformers", lambda *args, compiled: eager(*args, compiled=False))
    monkeypatch.setattr(cpu, "transformers_training", lambda *args, compiled: theirs(*args, compiled=False))
    return ran


@pytest.mark.slow
def test_cpu(small: list[str]) -> None:
    bench = bench_of("cpu")
    cpu.suite(bench)
    rows = {row.name: row for row in bench.results.rows}
    peers = ["deepfuse", "transformers eager", "transformers compiled"]
    for dtype in cpu.DTYPES:
        for what in ("decode, context 3", "prefill, 12 tokens", f"training step, 2 x {cpu.LENGTH} tokens"):
            row = rows.pop(f"{what}, {dtype}")
            assert list(row.figures) == peers and row.unit == "ms"
            assert (row.facts["what"], row.facts["dtype"]) == (what, dtype)
            assert ("share of bound" in row.facts) == what.startswith("decode")
        for what in ("shipped model, decode, context 5", "shipped model, prefill, 12 tokens"):
            assert list(rows.pop(f"{what}, {dtype}").figures) == peers[:2]
        assert "a_module_that_is_nowhere" in bench.results.left_out[f"llama.cpp, {dtype}"]
    assert [(row.name, *row.figures.values()) for row in rows.values()] == [
        ("build, cold", (2.0,) * 3),
        ("build, warm", (2.0,) * 3),
        ("import torch", (1000.0,) * 3),
        ("import deepfuse", (1000.0,) * 3),
        ("import transformers", (1000.0,) * 3),
        ("deepfuse --help", (2000.0,) * 3),
    ]
    assert small.count(cpu.BUILD) == 6


@pytest.mark.parametrize("suite", [cpu, model])
def test_what_is_committed_are_its_parts_and_what_it_lacks_is_listed(suite: ModuleType) -> None:
    name = Path(suite.__file__ or "").stem
    bench = Bench(bench_of(name).results, only="none of them")
    suite.suite(bench)
    found = committed(name)
    assert (
        {row.part for row in found.rows} <= set(bench.parts) <= {row.part for row in found.rows} | set(found.left_out)
    )


@pytest.mark.slow
def test_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DATA": tmp_path, "SOURCE": str(folder), "WINDOW": 30}.items():
        monkeypatch.setattr(model, name, value)
    monkeypatch.setattr(model, "run_code", lambda *_, **__: {"peak": 300e6, "weights": 139e6, "whole process": 1.0})
    bench = bench_of("model")
    with pytest.raises(ValueError, match=r"model: want .*heldout\.npy, made by python -m .*, got no such file"):
        model.suite(bench)
    np.save(tmp_path / "heldout.npy", np.arange(70, dtype=np.uint16) % TINY.vocab_size)
    (tmp_path / "heldout.txt").write_text(f"Some text.\n{SEPARATOR}\n")
    bench = bench_of("model")
    model.quality(bench)
    model.memory(bench)
    rows = {row.name: row for row in bench.results.rows}
    assert list(rows) == [row.name for row in committed("model").rows]
    bits = {name: row.figures["v3-tiny"][0] for name, row in rows.items() if row.unit == "bits per byte"}
    # every kind sees the same tokens; what rounding changes is small, and not nothing
    chance = np.log2(TINY.vocab_size) * 69 / len("Some text.")
    assert all(value == pytest.approx(chance, rel=0.2) for value in bits.values()) and len(set(bits.values())) == 4
    agreement = {name: row.facts["greedy agreement"] for name, row in rows.items() if row.unit == "bits per byte"}
    assert agreement["held-out text, bfloat16"] == 1.0 and all(0.5 < value <= 1.0 for value in agreement.values())
    assert rows["memory, fp8"].figures["peak"][0] == 300.0 and rows["memory, fp8"].facts["weights, MB"] == 139.0
