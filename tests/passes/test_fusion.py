"""Declared rules: what they rewrite, what they say of a site they leave alone, and what a registration refuses."""

import pytest
import torch

import deepfuse as df
from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.fusion import fusion
from deepfuse.passes.journal import noting
from deepfuse.passes.pipeline import default
from graphs import assert_same_graph, rewritten, trace

D = 16
SAMPLES = [(f"{dtype}[3, {D}]", f"{dtype}[3, {D}]", f"{dtype}[{D}]", 1e-6) for dtype in ("float32", "bfloat16")]


@fusion(stage="semantic", saves="one write and one read of the sum")
class FuseAddNorm:
    def pattern(x, residual, weight, eps):
        h = x + residual
        return rms_norm(h, weight, eps), h

    def replacement(x, residual, weight, eps):
        return add_rms_norm(x, residual, weight, eps)

    def guard(site):
        D = site.x.shape[-1]
        return None if D % 4 == 0 else f"hidden {D} is no multiple of 4"

    samples = SAMPLES


def arguments(width=D, dtype=torch.float32):
    return torch.randn(3, width, dtype=dtype), torch.randn(3, width, dtype=dtype), torch.randn(width, dtype=dtype)


def test_before_becomes_expected():
    args = arguments()
    gm, count, notes = rewritten(FuseAddNorm, lambda x, r, w: rms_norm(x + r, w, 0.5), *args)
    expected = trace(lambda x, r, w: add_rms_norm(x, r, w, 0.5)[0], *args)
    assert count == 1 and notes == ["rms_norm at rms_norm: matched"]
    assert_same_graph(gm, expected)
    torch.testing.assert_close(gm(*args), rms_norm(args[0] + args[1], args[2], 0.5), rtol=0, atol=0)


def test_all_results_are_replaced_and_operands_may_be_swapped():
    def before(x, r, w):
        h = r + x
        return rms_norm(h, w, 1e-5), h * 2

    args = arguments(dtype=torch.bfloat16)
    gm, count, _ = rewritten(FuseAddNorm, before, *args)
    assert count == 1
    for got, want in zip(gm(*args), before(*args), strict=True):
        assert torch.equal(got, want)
    assert FuseAddNorm(gm.graph) == 0


def test_new_nodes_know_their_values_and_origin():
    gm, _, _ = rewritten(FuseAddNorm, lambda x, r, w: rms_norm(x + r, w, 0.5), *arguments())
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize(
    ("fn", "width", "dtype", "reason"),
    [
        (lambda x, r, w: rms_norm(x, w, 1e-5), D, torch.float32, "the input x_1 stands where the rule wants add"),
        (lambda x, r, w: rms_norm(x * r, w, 1e-5), D, torch.float32, "mul stands where the rule wants add"),
        (
            lambda x, r, w: rms_norm(torch.add(x, r, alpha=2), w, 1e-5),
            D,
            torch.float32,
            "add: alpha is 2, rule wants 1",
        ),
        (
            lambda x, r, w: rms_norm(x + r, w, 1e-5),
            D,
            torch.float16,
            "x has dtype float16, rule wants float32 or bfloat16",
        ),
        (lambda x, r, w: rms_norm(x + r, w, 1e-5), 6, torch.float32, "guard: hidden 6 is no multiple of 4"),
        (lambda x, r, w: rms_norm(x + 1.0, w, 1e-5), D, torch.float32, "residual is 1.0, rule wants a tensor"),
    ],
    ids=["input", "other op", "constant", "dtype", "guard", "number"],
)
def test_near_misses_are_explained(fn, width, dtype, reason):
    _, count, notes = rewritten(FuseAddNorm, fn, *arguments(width, dtype))
    assert count == 0 and len(notes) == 1
    assert notes[0].startswith("rms_norm at rms_norm: ") and notes[0].endswith(reason)


@fusion(stage="semantic", saves="a launch")
class SquareOfNorm:
    def pattern(x, weight, eps):
        y = rms_norm(x, weight, eps)
        return y.square()

    def replacement(x, weight, eps):
        y = rms_norm(x, weight, eps)
        return y * y

    samples = [("float32[3, 16]", "float32[16]", 1e-6)]


def test_an_inner_result_that_others_read_stops_a_match():
    def shared(x, w):
        y = rms_norm(x, w, 1e-5)
        return y.square(), y + 1

    _, count, notes = rewritten(SquareOfNorm, shared, *arguments()[1:])
    assert count == 0 and "result has 2 users: pow, add" in notes[0]
    _, _, notes = rewritten(SquareOfNorm, lambda x, w: rms_norm(x, w, 1e-5).exp(), *arguments()[1:])
    assert "result of rms_norm is used by exp, rule wants it in pow" in notes[0]


def test_a_view_of_an_inner_result_that_others_read_stops_a_match():
    @fusion(stage="semantic", saves="a launch")
    class ExpOfHalf:
        def pattern(x):
            return x.exp()[:, :8].sin()

        def replacement(x):
            return x[:, :8].exp().sin()

        samples = [("float32[3, 16]",)]

    def shared(x):
        half = x.exp()[:, :8]
        return half.sin(), half + 1

    x = torch.randn(3, D)
    _, count, notes = rewritten(ExpOfHalf, shared, x)
    assert count == 0 and notes[0].endswith("result of slice has 2 users: sin, add")
    # a view of an input computes nothing
    _, count, _ = rewritten(FuseAddNorm, lambda x, r, w: (rms_norm(x.t().t() + r, w, 0.5), x.t()), *arguments())
    assert count == 1


@fusion(stage="semantic", saves="a read of the sum")
class FuseSum:
    """One with a residual, one without, each with results of its own."""

    def pattern(x, weight, eps):
        return rms_norm(x, weight, eps).exp()

    def replacement(x, weight, eps):
        return rms_norm(x, weight, eps).exp().clone()

    def pattern_add(x, residual, weight, eps):
        y, h = add_rms_norm(x, residual, weight, eps)
        return y.exp(), h

    def replacement_add(x, residual, weight, eps):
        h = x + residual
        return rms_norm(h, weight, eps).exp(), h

    samples = [("float32[3, 16]", "float32[16]", 1e-6)]
    samples_add = SAMPLES


def test_a_form_has_a_replacement_and_samples_of_its_own():
    x, r, w = arguments()

    def before(x, r, w):
        y, h = add_rms_norm(x, r, w, 1e-5)
        return rms_norm(h, w, 1e-5).exp(), y.exp()

    gm, count, notes = rewritten(FuseSum, before, x, r, w)
    assert count == 2 and all(n.endswith("matched") for n in notes)
    for got, want in zip(gm(x, r, w), before(x, r, w), strict=True):
        assert torch.equal(got, want)
    # bfloat16 is in the samples of one form only
    _, count, notes = rewritten(FuseSum, before, *arguments(dtype=torch.bfloat16))
    assert count == 1 and "rms_norm at rms_norm: x has dtype bfloat16, rule wants float32" in notes


def test_a_result_that_nobody_reads_need_not_be_there():
    x, r, w = arguments()
    gm, count, _ = rewritten(FuseSum, lambda x, r, w: add_rms_norm(x, r, w, 1e-5)[0].exp(), x, r, w)
    assert count == 1
    assert torch.equal(gm(x, r, w), add_rms_norm(x, r, w, 1e-5)[0].exp())
    # the other result cannot be missing: what is made of it is replaced
    _, count, notes = rewritten(FuseSum, lambda x, r, w: add_rms_norm(x, r, w, 1e-5)[1], x, r, w)
    assert count == 0 and notes[0].endswith("result 0 of add_rms_norm is used by nobody, rule wants it in exp")


@pytest.mark.parametrize("experts", [3, 100])
def test_free_integers_are_those_of_the_site(experts):
    from deepfuse.ops.expert_permute import expert_permute

    @fusion(stage="semantic", saves="nothing")
    class Permute:
        def pattern(x, experts, num_experts):
            rows, order, inverse, offsets = expert_permute(x, experts, num_experts)
            return rows.exp(), order, inverse, offsets

        def replacement(x, experts, num_experts):
            return expert_permute(x.exp(), experts, num_experts)

        free = ("num_experts",)
        samples = [("float32[3, 16]", "int64[3, 1]", 4)]

    def before(x, chosen):
        rows, *places = expert_permute(x, chosen, experts)
        return rows.exp(), *places

    x, chosen = torch.randn(5, 8), torch.randint(3, (5, 1))
    gm, count, notes = rewritten(Permute, before, x, chosen)
    assert count == 1, notes
    for got, want in zip(gm(x, chosen), before(x, chosen), strict=True):
        assert torch.equal(got, want)


def test_a_graph_without_the_ops_of_a_rule_is_not_searched(monkeypatch):
    monkeypatch.setattr(FuseAddNorm.rule, "_forms", None)
    monkeypatch.setattr(FuseAddNorm.rule, "_form", lambda *_: pytest.fail("a pattern was traced"))
    _, count, notes = rewritten(FuseAddNorm, lambda x, r, w: x + r * w, *arguments())
    assert (count, notes) == (0, ["nothing to do: the graph has no rms_norm"])


def test_an_input_that_comes_too_late_stops_a_match():
    def late(x, r, w):
        h = x + r
        seen = h.sum()
        return rms_norm(h, w * seen, 1e-5)

    _, count, notes = rewritten(FuseAddNorm, late, *arguments())
    assert count == 0 and "weight is computed after the result is read" in notes[0]


def test_arguments_that_the_replacement_does_not_take_stop_a_match():
    @fusion(stage="semantic", saves="nothing")
    class WrittenOut:
        def pattern(x, weight, eps):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

        def replacement(x, weight, eps):
            return rms_norm(x, weight, eps)

        samples = [("float32[3, 8]", "float32[8]", 1e-6)]

    def both(x, weight, gain):
        return WrittenOut.declared.pattern(x, gain, 1e-6), WrittenOut.declared.pattern(x, weight, 1e-6)

    gm, count, notes = rewritten(WrittenOut, both, torch.randn(3, 8), torch.randn(8), torch.randn(1))
    assert count == 1 and notes[1].endswith("matched")
    assert "the replacement does not take these arguments: rms_norm: want x [..., D] and weight [D]" in notes[0]
    assert sum(str(node.target) == "aten.rsqrt.default" for node in gm.graph.nodes) == 1


@pytest.mark.parametrize("symbolic", [False, True])
def test_sizes_are_those_of_the_site(symbolic):
    @fusion(stage="semantic", saves="nothing")
    class HalvesOfExp:
        def pattern(x):
            return x.exp()[:, : x.shape[-1] // 2]

        def replacement(x):
            return x[:, : x.shape[-1] // 2].exp().clone()

        samples = [("float32[3, 8]",)]

    from torch.fx.experimental.proxy_tensor import make_fx

    def before(x):
        return x.exp()[:, : x.shape[-1] // 2].clone(), x.exp()[:, :3].clone()

    gm = make_fx(before, tracing_mode="symbolic" if symbolic else "fake")(torch.randn(5, 10))
    notes = []
    with noting(notes):
        count = HalvesOfExp(gm.graph)
    # strides: a slice keeps those of the whole
    assert count == 0
    assert "with strides" in notes[0] and "sizes or numbers differ: slice: end is 3, rule wants" in notes[1]


def test_it_is_a_pass_like_others():
    assert FuseAddNorm.name == "fuse_add_norm" and FuseAddNorm.kind == "exact"
    assert FuseAddNorm.saves == "one write and one read of the sum"
    assert default().plus(FuseAddNorm).key("") != default().plus(SquareOfNorm).key("")
    assert df.fusion is fusion


def test_a_plain_function_takes_the_same_decorator():
    @fusion(stage="semantic", saves="nothing", kind="reassociating")
    def nothing(graph):
        return 0

    assert (nothing.name, nothing.kind, nothing.saves, nothing.rule) == ("nothing", "reassociating", "nothing", None)


def declare(**members):
    cls = type(
        "SomeRule",
        (),
        {"samples": SAMPLES, "pattern": FuseAddNorm.rule.cases[0].pattern, "replacement": add_rms_norm.reference}
        | members,
    )
    return fusion(stage="semantic", saves="nothing")(cls)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"replacement": lambda x, residual, weight, eps: (x, x[:1])}, r"gives, .*\[3, 16\].*got .*\[1, 16\]"),
        ({"replacement": lambda x, residual, weight, eps: (x, x.double())}, "got .*float64"),
        ({"replacement": lambda x, residual, weight, eps: x}, "want a replacement that gives what the pattern gives"),
        (
            {"replacement": lambda x, residual, weight, eps: (x.float(), x)},
            "got .*float32.*for .*bfloat16",
        ),
        ({"replacement": lambda x, residual, weight: (x, x)}, r"want <lambda> with the parameters \['x', 'residual'"),
        ({"pattern": lambda x, residual, weight, eps: (x + residual, (x * weight).t().t())}, "want a pattern with an anchor"),
        ({"samples": []}, "got no samples"),
        ({"replacement_other": add_rms_norm.reference}, "want pattern_other for replacement_other, got none"),
        ({"samples_other": SAMPLES}, "want pattern_other for samples_other, got none"),
        ({"free": ("eps",)}, "want free parameters that are ints, got eps = 1e-06"),
        ({"samples": [("float32[3, 16]",)]}, "want samples of"),
        ({"samples": [("floaty[3]", "float32[3]", "float32[3]", 1e-6)]}, r"want tensors as 'bfloat16\[3, 128\]', got 'floaty"),
    ],
    ids=[
        "shape", "dtype", "results", "dtype of a later sample", "parameters", "anchor", "samples", "replacement without pattern",
        "samples without pattern", "free", "arity", "sample",
    ],
)  # fmt: skip
def test_a_registration_refuses(members, message):
    with pytest.raises(ValueError, match=message):
        declare(**members)


def test_refusals_name_the_rule():
    with pytest.raises(ValueError, match="^some_rule: "):
        declare(replacement=lambda x, residual, weight, eps: x)
    with pytest.raises(ValueError, match="want stage out of"):
        fusion(stage="early", saves="")
    with pytest.raises(ValueError, match="want kind out of"):
        fusion(stage="semantic", saves="", kind="rough")


@pytest.mark.parametrize("shared", [False, True])
def test_what_others_read_too_stays_for_them_where_a_rule_says_so(shared):
    @fusion(stage="semantic", saves="nothing", kind="reassociating")
    class TwoNorms:
        anchor = torch.ops.aten.tanh.default

        def pattern(x, weight, eps):
            return rms_norm(x, weight, eps).tanh()

        def replacement(x, weight, eps):
            return -rms_norm(-x, weight, eps).neg().tanh().neg()

        samples = [(f"float32[3, {D}]", f"float32[{D}]", 1e-6)]

    TwoNorms.rule.shared = frozenset([rms_norm.overload] if shared else [])

    def before(x, r, w):
        y = rms_norm(x, w, 0.5)
        return y.tanh() + r, y * 2

    args = arguments()
    gm, count, notes = rewritten(TwoNorms, before, *args)
    assert count == shared
    assert notes[0].endswith(": matched" if shared else "result of rms_norm has 2 users: tanh, mul")
    torch.testing.assert_close(gm(*args), before(*args))
