"""The list of passes, how it is changed, and the runner: order, journal, key, errors."""

import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deepfuse as df
from deepfuse.ir.device import CPU
from deepfuse.ir.op import OPS
from deepfuse.ir.printer import run_text
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.sample import sample
from deepfuse.passes.fusion import fusion
from deepfuse.passes.journal import Journal, naming, note
from deepfuse.passes.pipeline import DEFAULT, Pipeline, default, pipeline_of
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


@graph_pass(stage="semantic", kind="exact")
def erase_and_raise(graph):
    (node,) = graph.find_nodes(op="call_function", target=rms_norm.overload)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
    raise KeyError("oops")


def test_default_passes_run_in_the_order_of_stages():
    assert [p.name for p in DEFAULT if p.stage == "semantic"][-2:] == ["merge_shared_expert", "merge_projections"]
    fusions = ["fuse_norm_quantize", "fuse_swiglu_quantize", "fuse_permute_quantize"]
    assert [p.name for p in DEFAULT if p.stage == "quantize"][:4] == ["share_quantize", *fusions]
    assert DEFAULT[-1].name == "lower"
    assert [STAGES.index(p.stage) for p in DEFAULT] == sorted(STAGES.index(p.stage) for p in DEFAULT)
    assert all(p.summary for p in DEFAULT)
    assert sorted(s for stages in HOOKS.values() for s in stages) == sorted(STAGES)


def test_public_face():
    assert df.passes.default().names == default().names


def test_without_leaves_out():
    assert [n for n in default().names if n not in default().without("absorb_mla").names] == ["absorb_mla"]


def test_without_an_unknown_name_gives_the_near_ones():
    with pytest.raises(ValueError, match="want a name out of absorb_mla, got 'absorb_mal'"):
        default().without("absorb_mal")


def test_a_graph_is_verified_after_the_passes_that_changed_it(monkeypatch):
    verified = []
    monkeypatch.setattr("deepfuse.passes.runner.verify", lambda graph, known: verified.append(graph))

    @graph_pass(stage="semantic", kind="exact")
    def nothing(graph):
        return 0

    gm = trace(lambda x, w: rms_norm(x, w, 1e-6), torch.randn(2, 4), torch.randn(4))
    runner = Runner(Pipeline((nothing, double_eps)), SETTINGS)
    runner.run(gm.graph, "joint")
    assert verified == [gm.graph]


def test_plus_puts_a_pass_last_in_its_stage():
    names = default().plus(double_eps).names
    assert names[names.index("merge_projections") :][:3] == ("merge_projections", "double_eps", "share_quantize")


def test_two_passes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names, got 'lower' twice"):
        default().plus(DEFAULT[-1])


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
    run_hooks(runner, gm, name)
    return gm, runner.journal


def run_hooks(runner, gm, name):
    with naming(name):
        for hook in HOOKS:
            runner.run(gm.graph, hook)
    gm.recompile()


def made_by_a_function(limit):
    @graph_pass(stage="semantic", kind="exact")
    def closes_over(graph):
        return len(graph.nodes) > limit

    @graph_pass(stage="semantic", kind="exact")
    def defaults(graph, *, at_most=limit):
        return len(graph.nodes) > at_most

    @fusion(stage="semantic", saves="nothing")
    class Guarded:
        def pattern(x):
            return x.exp()

        def replacement(x):
            return x.exp()

        def guard(site):
            return None if site.x.shape[0] < limit else "too long"

        samples = [("float32[2]",)]

    return closes_over, defaults, Guarded


def test_what_a_pass_was_made_with_is_part_of_the_key():
    for one, again, other in zip(*map(made_by_a_function, (8, 8, 9)), strict=True):
        assert one.source_hash() == again.source_hash() != other.source_hash()


def test_a_pass_without_a_file_is_known_by_its_code():
    text = """
@graph_pass(stage="semantic", kind="exact")
def short(graph):
    return any(len(n.users) > {} for n in graph.nodes)
"""
    hashes = []
    for least in (1, 1, 2):
        names = {"graph_pass": graph_pass, "__name__": "typed"}
        exec(text.format(least), names)  # noqa: S102 - as a prompt does
        hashes.append(names["short"].source_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_order_in_which_ops_were_imported_is_no_part_of_the_key(monkeypatch):
    before = default().key("a")
    monkeypatch.setattr("deepfuse.ir.op.OPS", dict(reversed(OPS.items())))
    assert default().key("a") == before
    # nor is whether all of ours were; one of somebody else's is
    monkeypatch.setattr("deepfuse.ir.op.OPS", {name: op for name, op in OPS.items() if op is not sample})
    assert default().key("a") == before
    monkeypatch.setattr("deepfuse.ir.op.OPS", OPS | {"theirs": replace(sample, reference=pytest.approx)})
    assert default().key("a") != before


def test_helpers_of_passes_and_costs_are_part_of_the_key(monkeypatch):
    before, original = default().key("a"), Path.read_text
    for name in ("splice.py", "cost.py"):
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "read_text", lambda p, *a, name=name, **how: original(p, *a, **how) + "#" * (p.name == name)
            )
            assert default().key("a") != before


def norm(x, w):
    return rms_norm(x, w, 1e-6)


ARGS = torch.randn(3, 8), torch.randn(8)


def test_journal_tells_what_each_pass_did():
    gm, journal = run(default().plus(double_eps), norm, *ARGS, name="decode_1")
    (graph,) = journal.graphs
    assert graph.name == "decode_1"
    by_name = {p.name: p for p in graph.passes}
    assert list(by_name) == [*default().plus(double_eps).names]
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


def test_a_change_of_arguments_that_a_pass_does_not_count_is_seen():
    _, journal = run(Pipeline((shift_uncounted,)), norm, *ARGS)
    snapshots = journal.graphs[0].snapshots
    assert snapshots["after:shift_uncounted"] != snapshots["before:shift_uncounted"]
    torch.testing.assert_close(run_text(snapshots["after:shift_uncounted"])(*ARGS), rms_norm(*ARGS, 1e-6 + 1e-2))


def test_journal_survives_json():
    _, journal = run(default(), norm, *ARGS)
    assert Journal.from_json(json.loads(json.dumps(journal.to_json()))) == journal


def test_a_failing_pass_is_named_with_the_graph_it_was_given():
    with pytest.raises(PassError, match=r"pass break_graph failed: .*meta\['val'\](.|\n)*rms_norm"):
        run(Pipeline((break_graph,)), norm, *ARGS)


def test_a_failing_pass_is_undone_and_reported(tmp_path):
    runner = Runner(
        Pipeline((double_eps, break_graph, erase_and_raise, *DEFAULT[-1:])), SETTINGS, strict=False, dumps=tmp_path
    )
    gm = trace(norm, *ARGS)
    with pytest.warns(UserWarning) as caught:
        run_hooks(runner, gm, "decode_1")
    gm.graph.lint()
    torch.testing.assert_close(gm(*ARGS), rms_norm(*ARGS, 2e-6))
    (graph,) = runner.journal.graphs
    by_name = {p.name: p for p in graph.passes}
    assert by_name["double_eps"].rewrites == 1 and not by_name["double_eps"].failure
    for name, error in (("break_graph", "GraphError: verify: want meta"), ("erase_and_raise", "KeyError: 'oops'")):
        entry = by_name[name]
        assert entry.failure.startswith(error) and entry.rewrites == 0 and not entry.op_changes
        assert graph.snapshots[f"before:{name}"] == graph.snapshots[f"after:{name}"]
        file = tmp_path / f"decode_1-{name}.py"
        assert any(
            f"pass {name} failed and was undone" in str(w.message) and str(file) in str(w.message) for w in caught
        )
        torch.testing.assert_close(run_text(file.read_text())(*ARGS), rms_norm(*ARGS, 2e-6))
    assert "failed and was undone: KeyError" in runner.journal.explain("erase_and_raise")
    assert by_name["lower"].op_changes["deepfuse.rms_norm.default"] == -1


@pytest.mark.parametrize("returned", [None, -1, "two"])
def test_a_pass_says_how_many_rewrites_it_made(returned):
    runner = Runner(Pipeline((Pass("vague", "semantic", "exact", lambda graph: returned),)), SETTINGS, strict=True)
    with pytest.raises(PassError, match=f"pass vague failed: want a pass that returns how many .*, got {returned!r}"):
        run_hooks(runner, trace(norm, *ARGS), "decode_1")


def test_strictness_is_part_of_the_key():
    assert len({Runner(default(), SETTINGS, strict=strict).key() for strict in (True, False)}) == 2


def test_strict_is_the_default_of_tests_only(monkeypatch):
    assert Runner(default(), SETTINGS).strict
    monkeypatch.delenv("DEEPFUSE_STRICT")
    assert not Runner(default(), SETTINGS).strict


def test_what_build_takes_for_passes():
    assert pipeline_of(None).names == default().names
    assert pipeline_of(default().without("lower")).names == default().without("lower").names
    assert pipeline_of(double_eps).names == pipeline_of([double_eps]).names == default().plus(double_eps).names
    with pytest.raises(TypeError, match="want a pipeline or passes .*, got 3"):
        pipeline_of(3)
    with pytest.raises(TypeError, match="want a pipeline or passes"):
        pipeline_of([norm])


def test_passes_of_packages(monkeypatch):
    def packages(value):
        entry = EntryPoint("double_eps", value, "deepfuse.passes")
        monkeypatch.setattr("deepfuse.passes.pipeline.entry_points", lambda group: [entry])

    monkeypatch.setitem(sys.modules, "some_package", SimpleNamespace(double_eps=double_eps, number=3))
    packages("some_package:double_eps")
    assert "double_eps" in default().names
    packages("some_package:number")
    with pytest.raises(TypeError, match="want a pass at the entry point double_eps = some_package:number, got 3"):
        default()
    packages("no_such_package:double_eps")
    with pytest.raises(TypeError, match="got No module named 'no_such_package'"):
        default()


def test_passes_are_left_out_by_the_environment(monkeypatch):
    monkeypatch.setenv("DEEPFUSE_WITHOUT", "absorb_mla, ")
    assert "absorb_mla" not in default().names and "lower" in default().names
    monkeypatch.setenv("DEEPFUSE_WITHOUT", "absorb_mal")
    with pytest.raises(ValueError, match="want a name out of absorb_mla, got 'absorb_mal'"):
        default()


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


@graph_pass(stage="semantic", kind="reassociating")
def nudge(graph):
    return shift_eps(graph, 1e-9)


@graph_pass(stage="semantic", kind="reassociating")
def shift(graph):
    return shift_eps(graph, 0.1)


@graph_pass(stage="semantic", kind="exact")
def nudge_exactly(graph):
    return shift_eps(graph, 1e-4)


@graph_pass(stage="semantic", kind="exact")
def forget_the_type(graph):
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    node.target = torch.ops.aten.isnan.default
    return 1


def shift_eps(graph, by):
    nodes = graph.find_nodes(op="call_function", target=rms_norm.overload)
    for node in nodes:
        node.args = (*node.args[:2], node.args[2] + by)
    return len(nodes)


@graph_pass(stage="semantic", kind="exact")
def shift_uncounted(graph):
    shift_eps(graph, 1e-2)
    return 0


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (nudge, None),
        (shift_uncounted, r"pass shift_uncounted \(exact\) changes values: .*want the same bits"),
        (shift, r"pass shift \(reassociating\) changes values: rms_norm: want errors up to"),
        (nudge_exactly, r"pass nudge_exactly \(exact\) changes values: .*want the same bits"),
        (
            forget_the_type,
            "pass forget_the_type failed: verify: want .*torch.bool.* from the shape rule of aten.isnan.default",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_verification(p, message):
    def fn(x, w):
        return rms_norm(x.exp(), w, 1e-2)

    runner = Runner(default().plus(p), SETTINGS, verify=True)
    compiled = torch.compile(fn, backend=runner.backend())
    if message is None:
        torch.testing.assert_close(compiled(*ARGS), fn(*ARGS))
        assert compiled(*ARGS) is not None
        return
    with pytest.raises(Exception, match=message):
        compiled(*ARGS)
