"""Routing: the same experts from every provider, ties and minus infinity included, and those of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepfuse.ops.route import COMPARE_PAIRS, _compare, _launch, route, route_ref

on_kernel_device = pytest.mark.usefixtures("kernel_device")


@st.composite
def _arguments(draw):
    n_group, group_size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    topk_group = draw(st.integers(1, n_group))
    E = n_group * group_size
    # few values, so that there are ties; a bias of -inf switches an expert off
    logits = draw(st.lists(st.lists(st.sampled_from([-2.0, 0.0, 1.0]), min_size=E, max_size=E), max_size=3))
    bias = draw(st.none() | st.lists(st.sampled_from([0.0, -4.0, 0.5, float("-inf")]), min_size=E, max_size=E))
    return (
        torch.tensor(logits).reshape(-1, E),
        None if bias is None else torch.tensor(bias),
        draw(st.sampled_from(["sigmoid", "softmax"])),
        draw(st.sampled_from(["top2_sum", "max"])),
        n_group,
        topk_group,
        draw(st.integers(1, topk_group * group_size)),
        draw(st.booleans()),
        2.5,
        draw(st.integers(0, 2)),
    )


@on_kernel_device
@pytest.mark.parametrize("provider", [_launch, _compare], ids=["triton", "compare"])
@settings(max_examples=50)
@given(args=_arguments())
def test_every_provider_chooses_the_experts_of_the_reference(provider, args):
    weights, experts = provider(*args)
    expected_weights, expected_experts = route_ref(*args)
    assert experts.dtype == torch.int64 and experts.tolist() == expected_experts.tolist()
    torch.testing.assert_close(weights, expected_weights)


@on_kernel_device
@pytest.mark.parametrize("provider", [_launch, _compare], ids=["triton", "compare"])
@pytest.mark.parametrize(
    ("E", "n_group", "topk_group", "k"), [(256, 8, 4, 8), (160, 8, 3, 6), (12, 3, 2, 4), (7, 1, 1, 7)]
)
def test_every_provider_agrees_at_the_sizes_of_models(provider, E, n_group, topk_group, k):
    logits, bias = torch.randn(4, E), torch.randn(E) * 0.1
    # rows of a wider tensor
    logits = torch.cat([logits, logits], 1)[:, :E]
    args = logits, bias, "sigmoid", "top2_sum", n_group, topk_group, k, True, 2.5, 1
    for actual, expected in zip(provider(*args), route_ref(*args), strict=True):
        torch.testing.assert_close(actual, expected)


@on_kernel_device
@pytest.mark.parametrize("provider", [_launch, _compare], ids=["triton", "compare"])
def test_logits_that_are_no_numbers_choose_experts_that_exist(provider):
    logits = torch.randn(3, 16)
    logits[0, 5], logits[1] = float("nan"), float("nan")
    args = logits, None, "sigmoid", "top2_sum", 4, 2, 3, True, 1.0, 1
    assert provider(*args)[1].tolist() == route_ref(*args)[1].tolist()


def _per_expert(weights, experts, E):
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    return torch.zeros(weights.shape[0], E).scatter(1, experts, weights)


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("norm", [True, False])
# at -3 every choice is negative: a mask of zeros would let the dropped groups win
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_routes_as_the_deepseek_v3_of_transformers(n_group, topk_group, norm, offset):
    E = 16
    config = DeepseekV3Config(
        hidden_size=E,
        n_routed_experts=E,
        num_experts_per_tok=4,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data = torch.eye(E)
    router.e_score_correction_bias = torch.randn(E) * 0.2 + offset
    x = torch.randn(20, E)
    logits, weights, experts = router(x)
    actual = route(logits, router.e_score_correction_bias, "sigmoid", "top2_sum", n_group, topk_group, 4, norm, 2.5, 0)
    torch.testing.assert_close(_per_expert(*actual, E), _per_expert(weights, experts, E))


@pytest.mark.parametrize(("method", "n_group", "topk_group"), [("greedy", 1, 1), ("group_limited_greedy", 4, 2)])
def test_routes_as_the_deepseek_v2_of_transformers(method, n_group, topk_group):
    E = 16
    config = DeepseekV2Config(
        hidden_size=E,
        num_attention_heads=1,
        n_routed_experts=E,
        num_experts_per_tok=3,
        topk_method=method,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    )
    router = DeepseekV2TopkRouter(config)
    router.weight.data = torch.eye(E)
    logits, weights, experts = router(torch.randn(20, E))
    actual = route(logits, None, "softmax", "max", n_group, topk_group, 3, False, 16.0, 0)
    torch.testing.assert_close(_per_expert(*actual, E), _per_expert(weights, experts, E))


def test_ties_go_to_the_lower_expert_and_the_lower_group():
    _, experts = route(torch.zeros(2, 12), None, "sigmoid", "top2_sum", 4, 2, 5, True, 1.0, 0)
    assert experts.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_experts_come_best_first_and_outside_the_kept_groups_none_is_taken():
    # the best single expert, 5, is in a group whose best two lose
    logits = torch.tensor([[0.0, 2.0, 2.5, 2.0, -9.0, 3.0]])
    _, experts = route(logits, None, "sigmoid", "top2_sum", 3, 2, 3, True, 1.0, 0)
    assert experts.tolist() == [[2, 1, 3]]
    _, experts = route(logits, None, "sigmoid", "max", 3, 2, 3, True, 1.0, 0)
    assert experts.tolist() == [[5, 2, 3]]


@on_kernel_device
@pytest.mark.parametrize("provider", [_launch, _compare, route_ref], ids=["triton", "compare", "reference"])
@pytest.mark.parametrize(("tokens", "shared"), [(3, 1), (3, 3), (0, 2)])
def test_shared_experts_stand_behind_the_chosen_and_weigh_one(provider, tokens, shared):
    logits, rest = torch.randn(tokens, 12), (torch.randn(12), "sigmoid", "top2_sum", 3, 2, 4, True, 2.5)
    weights, experts = provider(logits, *rest, shared)
    chosen_weights, chosen = route_ref(logits, *rest, 0)
    assert experts.tolist() == [[*row, *range(12, 12 + shared)] for row in chosen.tolist()]
    torch.testing.assert_close(weights[:, :4], chosen_weights)
    assert weights.shape == (tokens, 4 + shared) and (weights[:, 4:] == 1).all()


def test_the_bias_steers_the_choice_but_not_the_weights():
    logits, bias = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([0.0, 5.0, 0.0])
    weights, experts = route(logits, bias, "sigmoid", "max", 1, 1, 2, False, 1.0, 0)
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [1, 2]])


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
def test_gradient(scoring_func, norm, shared):
    rest = torch.randn(12) * 0.1, scoring_func, "top2_sum", 3, 2, 4, norm, 2.5, shared
    logits, dweights = torch.randn(6, 12, dtype=torch.float64, requires_grad=True), torch.randn(6, 4 + shared)
    logits32 = logits.detach().float().requires_grad_()
    (actual,) = torch.autograd.grad(route(logits32, *rest)[0], logits32, dweights)
    (expected,) = torch.autograd.grad(route_ref(logits, *rest)[0], logits, dweights.double())
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_comparison_is_taken_where_the_tokens_are_known_to_be_few():
    rest = None, "sigmoid", "max", 1, 1, 2, True, 1.0, 0
    few, many = COMPARE_PAIRS // 16**2, COMPARE_PAIRS // 16**2 + 1
    assert route.choose((torch.ones(few, 16), *rest), compiled=True).provider.name == "compare"
    assert route.choose((torch.ones(many, 16), *rest), compiled=True).provider.name == "reference"
    assert route.choose((torch.ones(few, 16), *rest)).provider.name == "reference"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.ones(2, 3, 8)}, ValueError, r"want logits \[T, E\] and bias \[E\] or None, got \[2, 3, 8\]"),
        ({1: torch.ones(7)}, ValueError, r"got \[2, 8\] and \[7\]"),
        ({0: torch.ones(2, 8, dtype=torch.bfloat16)}, TypeError, "want float32 logits .* got torch.bfloat16"),
        ({2: "relu"}, ValueError, r"want scoring_func out of \['sigmoid', 'softmax'\], got 'relu'"),
        ({3: "mean"}, ValueError, r"want group_score out of \['top2_sum', 'max'\], got 'mean'"),
        ({4: 3}, ValueError, "want n_group dividing the 8 experts .* got n_group 3 and topk_group 1"),
        ({5: 3}, ValueError, "got n_group 2 and topk_group 3"),
        ({6: 5}, ValueError, "want 1 <= num_experts_per_tok <= 4, the experts of 1 groups, got 5"),
        ({9: -1}, ValueError, "want n_shared_experts >= 0, got -1"),
    ],
)
def test_rejects(change, error, message):
    args = dict(enumerate([torch.ones(2, 8), torch.ones(8), "sigmoid", "max", 2, 1, 2, True, 1.0, 0])) | change
    with pytest.raises(error, match=message):
        route(*args.values())
