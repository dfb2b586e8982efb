"""The facts of `docs/passes.md`: what is counted is what the passes do, and the page is what was counted."""

import itertools
import json

import pytest

from benchmark_scripts import load_script
from deepfuse.passes.pipeline import default

facts = load_script("graph_facts")
sections = load_script("sections")
RERUN = "run python benchmarks/graph_facts.py"
DECODE, PREFILL = facts.WORKLOADS[0], facts.WORKLOADS[2]


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(facts.RESULTS.read_text())


@pytest.fixture(scope="module")
def decode() -> dict:
    """A decode step of two layers in bfloat16."""
    return facts.rows_of(facts.capture(facts.cut(2), DECODE))[0]


def test_the_page_lists_every_pass() -> None:
    listed = sections.section(facts.TEXT.read_text(), "graph_facts: passes")
    assert listed == facts.passes_table(), f"{RERUN} --keep"
    for p in default().passes:
        (row,) = (line for line in listed.splitlines() if line.startswith(f"| `{p.name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 6 and all(cells), f"{p.name}: want a summary, Why (or saves) and Requires, got {cells}"
        assert cells[1:3] == [p.stage, p.kind]


def test_the_page_shows_the_results(results: dict) -> None:
    text = facts.TEXT.read_text()
    for name, content in facts.tables(results).items():
        assert sections.section(text, name) == content, f"{RERUN} --keep"


def test_the_results_are_those_of_these_passes(results: dict, decode: dict) -> None:
    assert results["bfloat16"][DECODE.name]["two layers"] == decode, RERUN
    for form in facts.FORMS:
        assert list(results[form]) == [workload.name for workload in facts.WORKLOADS]


def test_products_are_those_of_the_architecture(decode: dict) -> None:
    attention, dense, experts, head = 5, 3, 1 + 2 + 3, 1
    assert decode[facts.PLAIN]["matmul launches"] == 2 * attention + dense + experts + head
    assert decode[facts.UNREWRITTEN]["matmul launches"] == decode[facts.PLAIN]["matmul launches"]
    # absorbed, the product that expands the cache becomes one before the attention and one behind it
    assert decode["absorb_mla"]["matmul launches"] == decode[facts.PLAIN]["matmul launches"] + 2


def test_absorbing_spares_the_expanded_cache(decode: dict) -> None:
    # keys and values of 128 heads of 128 each, in bfloat16, of 65 pages; two layers
    expanded = 2 * 65 * 64 * 128 * 2 * 128 * 2
    latent = 2 * 65 * 64 * 576 * 2
    assert decode[facts.PLAIN]["attention bytes"] == pytest.approx(expanded, rel=0.01)
    # beside the latents the queries and results, of 128 heads
    assert decode["absorb_mla"]["attention bytes"] == pytest.approx(latent, rel=0.07)


def test_the_goals_that_the_page_says_are_met_are_met(results: dict) -> None:
    for form, workload in (("bfloat16", DECODE), ("FP8", DECODE), ("FP8", PREFILL)):
        for part in ("two layers", facts.LAYER):
            rows = results[form][workload.name][part]
            before, after = rows[facts.PLAIN], list(rows.values())[-1]
            assert facts.outside_matmuls(before) >= 2 * facts.outside_matmuls(after)
            moved = [facts.outside_matmuls(row) - row["attention bytes"] for row in (before, after)]
            assert moved[0] >= 2 * moved[1]
    for form, workload in itertools.product(facts.FORMS, facts.WORKLOADS[:2]):
        assert list(results[form][workload.name][facts.LAYER].values())[-1]["launches"] <= 18


def test_each_pass_saves_what_it_says() -> None:
    """Of FP8's passes in a prefill of a few tokens: each saves launches, and bytes of activations."""
    few = facts.Workload("prefill, 64 tokens", 1, 64)
    rows, by_name = facts.rows_of(facts.capture(facts.cut(2), few, "FP8"))
    order = [name for name in rows if name not in (facts.PLAIN, facts.UNREWRITTEN)]
    for before, after in itertools.pairwise(order):
        assert rows[after]["launches"] < rows[before]["launches"], after
        assert facts.outside_matmuls(rows[after]) < facts.outside_matmuls(rows[before]), after
    last = rows[order[-1]]
    assert sum(by_name.values()) == last["launches"]
    # no weight is dequantized, and no activation read by two kernels to be quantized
    assert not any(name.startswith("dequantize") for name in by_name)
    assert last["weight bytes"] < rows[facts.PLAIN]["weight bytes"] / 100
