"""What every declared rule must keep, generated from its declaration: one test a pattern and sample.

A pattern of the rule becomes its replacement, once; a second run finds nothing; values stay what they were, bitwise
where the rule says exact, else within ``ir``'s tolerance (or the rule's own, with its reason).
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepfuse.ir.tolerance import DEFAULT_TOLERANCE, EXACT
from deepfuse.passes.journal import noting
from deepfuse.passes.pipeline import DEFAULT
from deepfuse.passes.samples import materialized
from deepfuse.passes.trace import trace
from graphs import assert_same_graph

RULES = [p for p in DEFAULT if p.rule is not None]
CASES = [
    pytest.param(p, case, sample, id=f"{p.name}-{case.pattern.__name__}-{i}")
    for p in RULES
    for case in p.rule.cases
    for i, sample in enumerate(case.samples)
]


def graph_of(fn, arguments):
    tensors = [a for a in arguments if isinstance(a, Tensor)]

    def on_tensors(*given):
        left = iter(given)
        return fn(*(next(left) if isinstance(a, Tensor) else a for a in arguments))

    return torch.fx.GraphModule({}, trace(on_tensors, tensors, FakeTensorMode())), tensors


@pytest.mark.parametrize(("p", "case", "sample"), CASES)
def test_a_pattern_becomes_the_replacement(p, case, sample, monkeypatch):
    # a guard may want to see where an input comes from, and a pattern alone has only inputs
    monkeypatch.setattr(p.rule, "guard", lambda site: None)
    arguments = materialized(sample)
    gm, tensors = graph_of(case.pattern, arguments)
    notes = []
    with noting(notes):
        assert p(gm.graph) == 1, notes
        assert any(note.endswith(": matched") for note in notes)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    expected, _ = graph_of(case.replacement, arguments)
    expected.graph.eliminate_dead_code()
    assert_same_graph(gm, expected)
    assert p(gm.graph) == 0

    got, want = gm(*tensors), case.pattern(*arguments)
    pairs = [(got, want)] if isinstance(want, Tensor) else zip(got, want, strict=True)
    for a, b in pairs:
        bound = EXACT if p.kind == "exact" else p.rule.tolerance.get(b.dtype, DEFAULT_TOLERANCE[b.dtype])
        torch.testing.assert_close(a, b, atol=bound.atol, rtol=bound.rtol)


@pytest.mark.parametrize("p", RULES, ids=lambda p: p.name)
def test_a_rule_says_what_it_is(p):
    assert p.saves and p.summary and p.rule.forms
