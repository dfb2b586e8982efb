"""The list of passes, how it is changed, and the runner: order, journal, key, errors."""

import json
from pathlib import Path

import pytest
import torch

import deepfuse as df
from deepfuse.ir.device import CPU
from deepfuse.ir.printer import run_text
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.journal import Journal, naming, note
from deepfuse.passes.pipeline import DEFAULT, Pipeline, default
from deepfuse.passes.record import STAGES, Pass, graph_pass
from deepfuse.passes.runner import HOOKS, PassError, Runner
from graphs import trace

SETTINGS = {"providers": {}, "device": CPU, "max_seq_len": 64}


@graph_pass(stage="semantic", kind="exact")
def double_eps(graph):
    changed = 0
    for node in graph.find_nodes(op="call_function", target=rms_norm.overload):
        node.args = (*node.args[:2], 2 * node.args[2])
        note("doubled")
        changed += 1
    return changed


@graph_pass(stage="semantic", kind="exact")
def break_graph(graph):
    for node in graph.nodes:
        node.meta.pop("val", None)
    return 1


def test_default_passes_run_in_the_order_of_stages():
    assert [p.name for p in DEFAULT] == ["absorb_mla", "lower"]
    assert [STAGES.index(p.stage) for p in DEFAULT] == sorted(STAGES.index(p.stage) for p in DEFAULT)
    assert all(p.summary for p in DEFAULT)
    assert sorted(s for stages in HOOKS.values() for s in stages) == sorted(STAGES)


def test_public_face():
    assert df.passes.default().names == default().names


def test_without_leaves_out():
    assert default().without("absorb_mla").names == ("lower",)


def test_without_an_unknown_name_gives_the_near_ones():
    with pytest.raises(ValueError, match="want a name out of absorb_mla, got 'absorb_mal'"):
        default().without("absorb_mal")


def test_plus_puts_a_pass_last_in_its_stage():
    assert default().plus(double_eps).names == ("absorb_mla", "double_eps", "lower")


def test_two_passes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names, got 'lower' twice"):
        default().plus(DEFAULT[1])


def test_passes_out_of_order_are_refused():
    with pytest.raises(ValueError, match="want stages in the order"):
        Pipeline(tuple(reversed(DEFAULT)))


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="want stage out of"):
        graph_pass(stage="early", kind="exact")


def test_key_changes_with_passes_order_settings_and_source():
    keys = {
        default().key("a"),
        default().key("b"),
        default().without("absorb_mla").key("a"),
        default().plus(double_eps).key("a"),
        default().plus(double_eps, Pass("other", "semantic", "exact", double_eps.fn)).key("a"),
        default().plus(Pass("other", "semantic", "exact", double_eps.fn), double_eps).key("a"),
    }
    assert len(keys) == 6
    assert default().key("a") == default().key("a")


def run(pipeline, fn, *args, name="graph"):
    runner = Runner(pipeline, SETTINGS)
    gm = trace(fn, *args)
    with naming(name):
        for hook in HOOKS:
            runner.run(gm.graph, hook)
    gm.recompile()
    return gm, runner.journal


def test_helpers_of_passes_and_costs_are_part_of_the_key(monkeypatch):
    before, original = default().key("a"), Path.read_text
    for name in ("splice.py", "cost.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda p, *a, name=name: original(p, *a) + "#" * (p.name == name))
            assert default().key("a") != before


def norm(x, w):
    return rms_norm(x, w, 1e-6)


ARGS = torch.randn(3, 8), torch.randn(8)


def test_journal_tells_what_each_pass_did():
    gm, journal = run(default().plus(double_eps), norm, *ARGS, name="decode_1")
    (graph,) = journal.graphs
    assert graph.name == "decode_1"
    by_name = {p.name: p for p in graph.passes}
    assert list(by_name) == ["absorb_mla", "double_eps", "lower"]
    assert by_name["double_eps"].rewrites == 1 and by_name["double_eps"].notes == ["doubled"]
    assert by_name["lower"].op_changes["deepfuse.rms_norm.default"] == -1
    torch.testing.assert_close(gm(*ARGS), rms_norm(*ARGS, 2e-6))


def test_snapshots_run():
    _, journal = run(default(), norm, *ARGS)
    for stage in ("before:lower", "after:lower"):
        text = journal.graphs[0].snapshots[stage]
        torch.testing.assert_close(
            run_text(text)(*ARGS)[0] if "return (" in text else run_text(text)(*ARGS), norm(*ARGS)
        )


def test_journal_survives_json():
    _, journal = run(default(), norm, *ARGS)
    assert Journal.from_json(json.loads(json.dumps(journal.to_json()))) == journal


def test_a_failing_pass_is_named_with_the_graph_it_was_given():
    with pytest.raises(PassError, match=r"pass break_graph failed: .*meta\['val'\](.|\n)*rms_norm"):
        run(Pipeline((break_graph,)), norm, *ARGS)


def test_a_user_pass_works_through_build():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(ARGS[1])

        def forward(self, x):
            return rms_norm(x, self.weight, 1.0)

    built = df.build(Norm(), passes=df.passes.default().plus(double_eps), compile=False, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(built(ARGS[0]), rms_norm(*ARGS, 2.0))
    assert [p.rewrites for p in built.journal.graphs[0].passes if p.name == "double_eps"] == [1]
