import pytest
import torch

from deepfuse.blocks.balance import SequenceBalance, sequence_balance_loss
from deepfuse.blocks.moe import MoE
from tiny_checkpoint import TINY, TINY_V2


def by_hand(scores, seq_len, K):
    """Eq. 17-20, one sequence and one expert at a time, in Python's floats."""
    losses = []
    for sequence in scores.double().split(seq_len):
        E, loss = sequence.shape[1], 0.0
        best = [set(sorted(range(E), key=lambda e: -row[e])[:K]) for row in sequence.tolist()]
        for e in range(E):
            f = E / (K * seq_len) * sum(e in chosen for chosen in best)
            loss += f * sum(row[e] / sum(row) for row in sequence.tolist()) / seq_len
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("scoring", "score"), [("sigmoid", torch.sigmoid), ("softmax", lambda x: x.softmax(-1))])
def test_value_is_that_of_the_equations(scoring, score):
    logits = torch.randn(12, 8)
    actual = sequence_balance_loss(logits, 4, 3, scoring)
    # float32 sums of 8 experts and 4 tokens, all positive: 12 roundings of 6e-8
    assert float(actual) == pytest.approx(by_hand(score(logits), 4, 3), rel=1e-6)


def test_equal_experts_have_a_loss_of_one_and_a_favourite_more():
    # each token has another best expert
    even = torch.eye(8) * 1e-3
    assert float(sequence_balance_loss(even, 8, 1, "softmax")) == pytest.approx(1.0, rel=1e-6)
    favourite = torch.zeros(8, 8).index_fill(1, torch.tensor(5), 3.0)
    assert float(sequence_balance_loss(favourite, 8, 1, "softmax")) > 5
    # balanced over both sequences, but not in each
    halves = torch.cat([favourite, favourite.roll(1, 1)])
    assert float(sequence_balance_loss(halves, 8, 1, "softmax")) > 5


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's Dynamo
@pytest.mark.parametrize(("config", "compiled"), [(TINY, False), (TINY_V2, False), (TINY, True)])
def test_gradients_are_those_of_the_sum_of_both_losses(config, compiled):
    torch.manual_seed(0)
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, dy, alpha, L = torch.randn(10, config.hidden_size), torch.randn(10, config.hidden_size), 0.5, 5
    router = moe.gate
    logits = torch.nn.functional.linear(x, router.weight)
    loss = alpha * sequence_balance_loss(logits, L, config.num_experts_per_tok, config.scoring_func)
    expected = ((moe(x) * dy).sum() + loss).detach(), moe(x)
    ((expected[1] * dy).sum() + loss).backward()
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters()}
    moe.zero_grad()
    router.balance = SequenceBalance(alpha, L)
    run = torch.compile(moe, fullgraph=True, backend="aot_eager") if compiled else moe
    y = run(x)
    assert torch.equal(y, expected[1])
    y.backward(dy)
    for name, parameter in moe.named_parameters():
        # the two gradients of the router are added before or after its weight's product: 10 terms, 6e-8 each
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)
    moe.zero_grad()
    router.balance = None
    moe(x).backward(dy)
    assert not torch.allclose(router.weight.grad, gradients["gate.weight"], rtol=1e-2)


def test_it_is_off_in_evaluation():
    torch.manual_seed(0)
    moe = MoE(TINY).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(4, TINY.hidden_size)
    expected = moe(x)
    # 4 tokens are no sequences of 3
    moe.gate.balance = SequenceBalance(1.0, 3)
    assert torch.equal(moe(x), expected)
    with pytest.raises(ValueError, match="want tokens of whole sequences of seq_len = 3, got 4"):
        moe.train()(x)


def test_bad_input():
    with pytest.raises(ValueError, match="want tokens of whole sequences of seq_len = 4, got 6"):
        sequence_balance_loss(torch.randn(6, 8), 4, 2, "sigmoid")
    for alpha, seq_len in ((-1.0, 4), (float("nan"), 4), (1e-4, 0)):
        with pytest.raises(ValueError, match=f"want a finite alpha >= 0 and seq_len >= 1, got {alpha} and {seq_len}"):
            SequenceBalance(alpha, seq_len)
