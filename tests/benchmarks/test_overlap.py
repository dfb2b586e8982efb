"""What the overlap suite makes of the ranks' times; the ranks themselves run over a real link, when it is measured."""

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_device import facts
from deepfuse.profiling.bench_results import Results

overlap, ranks = load_script("overlap"), load_script("overlap_ranks")


def rows(monkeypatch, found, missing=""):
    monkeypatch.setattr(overlap, "missing", lambda: missing)
    rates = []

    def run(specs, rate, script="overlap_ranks.py"):
        rates.append(rate)
        assert all(("shared" in spec) == (script == "overlap_ranks.py") for spec in specs)
        return [found for _ in specs]

    monkeypatch.setattr(overlap, "run_ranks", run)
    bench = Bench(Results(suite="overlap", command="", device=facts(torch.device("cpu")), versions={}))
    overlap.suite(bench)
    return {row.name: row for row in bench.results.rows}, rates, bench.results.left_out


def measured(sequential):
    medians = {
        overlap.WITHOUT: 1.3,
        overlap.NAME: 1.05,
        ranks.CHUNKED: 1.02,
        overlap.SEQUENTIAL: sequential,
        overlap.COMPUTE: 1.0,
        overlap.INDEPENDENT: 0.8,
        overlap.COMMUNICATION: 0.5,
    }
    peak = {overlap.SEQUENTIAL: 100, overlap.NAME: 110, ranks.CHUNKED: 105}
    return {
        "times": {name: [seconds] * 5 for name, seconds in medians.items()},
        "notes": ["moved"],
        "chosen": "two-batch",
        "why": ["two-batch, as predicted", "shared expert: predicted"],
        "chunked": ["moved more"],
        "equal": True,
        "left_out": "",
        "peak": peak,
    }


def test_hidden_is_what_is_saved_of_what_could_be(monkeypatch):
    found, rates, left_out = rows(monkeypatch, measured(1.5))
    # 0.65 of 0.8 s for 1024 rows of 2048 bytes, there and back, both ways: 8.4 MB
    assert rates[0] == 1e9 and rates[1] == 16e6 and not left_out
    facts_of = found["forward, 16 MB/s"].facts
    assert facts_of["hidden"] == "90%" and facts_of["hidden_in_chunks"] == "96%" and facts_of["peak_memory"] == "1.10x"
    assert "16 tokens, 20 MB/s" in found
    model = found["2 layers, 2 x 64 tokens, 20 MB/s"]
    assert (
        model.facts["chosen"] == "two-batch"
        and model.facts["why"] == "two-batch, as predicted; shared expert: predicted"
    )


def test_it_is_void_where_the_parts_do_not_add_up(monkeypatch):
    found, _, _ = rows(monkeypatch, measured(1.7))
    assert found["forward, 16 MB/s"].facts["hidden"] == "void: one after the other is 13% off the sum of its parts"


def test_without_root_it_is_the_loopback_and_says_so(monkeypatch):
    found, rates, left_out = rows(monkeypatch, measured(1.5), missing="needs root")
    assert set(rates) == {0.0} and "forward, loopback" in found
    assert left_out == {"slow link": "needs root: the rows are of the loopback"}


@pytest.mark.slow
def test_a_form_is_chosen_of_whole_layers_and_each_is_timed(tmp_path):
    spec = {**overlap.MODEL, "layers": 1, "length": 8, "hidden": 32, "intermediate": 32, "heads": 2, "rounds": 2}
    (found,) = overlap.run_ranks([spec], 0.0, "overlap_forms.py", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    forms = load_script("overlap_forms")
    assert set(found["times"]) >= {overlap.WITHOUT, forms.AUTO, "shared expert", "chunked x2", "two-batch"}
    # over the loopback such messages are latency alone
    assert found["chosen"] == "shared expert" and found["why"][0].startswith("refused: 16 tokens, latency-bound")
    assert all(len(seconds) == 2 for seconds in found["times"].values())
