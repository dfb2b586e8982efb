"""Training on a corpus a model can learn by heart."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deepfuse as df
from deepfuse.blocks.balance import sequence_balance_loss
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Router
from deepfuse.runtime.losses import next_token_loss
from deepfuse.runtime.trainer import Trainer
from deepfuse.runtime.training import Training
from tiny_checkpoint import TINY, assert_same_state

CONFIG = replace(TINY, num_hidden_layers=2)
CORPUS = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
TRAINING = Training(
    steps=20, batch_size=4, seq_len=16, lr=1e-2, warmup_steps=3, dtype=torch.float32, mtp_steps=3, checkpoint_every=8
)
# torch 2.11's Dynamo
OF_A_FUNCTION = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
MTP = f"model.layers.{CONFIG.num_hidden_layers}."


def model_of(config: df.Config = CONFIG) -> CausalLM:
    model = CausalLM(config)
    model.initialize(seed=1)
    return model.train()


def trainer_of(**changes: Any) -> Trainer:
    return Trainer(model_of(), replace(TRAINING, **changes), compile=False)


def biases(model: CausalLM) -> list[Tensor]:
    return [m.e_score_correction_bias for m in model.modules() if isinstance(m, Router)]  # type: ignore[misc]


def copies(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[dict[str, float]], list[float], Path]:
    """A run from beginning to end: the trainer, its rows, the loss of each step and its folder."""
    trainer, folder = trainer_of(), tmp_path_factory.mktemp("run")
    losses: list[float] = []
    rows = list(noted(trainer, folder, losses))
    return trainer, rows, losses, folder


def noted(trainer: Trainer, folder: Path, losses: list[float]) -> Iterator[dict[str, float]]:
    """``trainer.run``, adding the loss of each step to ``losses``."""
    step = trainer.train_step

    def train_step(tokens: np.ndarray) -> float:
        losses.append(step(tokens))
        return losses[-1]

    trainer.train_step = train_step  # type: ignore[method-assign]
    return trainer.run(folder, CORPUS, CORPUS[:40])


def test_a_corpus_is_learned(run: tuple[Trainer, list[dict[str, float]], list[float], Path]) -> None:
    trainer, rows, losses, folder = run
    steps = TRAINING.steps
    # from all tokens being equally likely
    assert losses[0] == pytest.approx(np.log(CONFIG.vocab_size), abs=0.1)
    assert losses[steps - 1] < 0.3 * losses[0]
    assert losses[-1] < losses[steps]
    assert [row["step"] for row in rows] == [8, 16, 23]
    assert rows[0]["loss"] == pytest.approx(np.mean(losses[:8]))
    assert rows[-1]["loss"] == pytest.approx(np.mean(losses[16:]))
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"] < losses[0]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["log.jsonl", "trainer.safetensors"]
    assert {g.name for g in trainer.runner.journal.graphs} == {"train", "mtp_train"}


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    run: tuple[Trainer, list[dict[str, float]], list[float], Path], tmp_path: Path
) -> None:
    whole, _, wanted, _ = run
    losses: list[float] = []
    assert next(noted(trainer_of(), tmp_path, losses))["step"] == len(losses) == 8
    resumed = trainer_of()
    assert [row["step"] for row in noted(resumed, tmp_path, losses)] == [16, 23]
    assert losses == wanted
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())


def test_a_finished_run_has_nothing_left_to_do(
    run: tuple[Trainer, list[dict[str, float]], list[float], Path],
) -> None:
    whole, _, _, folder = run
    again = trainer_of()
    assert list(again.run(folder, CORPUS)) == []
    assert_same_state(again.model.state_dict(), whole.model.state_dict())


def test_each_phase_trains_its_part_alone(tmp_path: Path) -> None:
    settings = {"steps": 1, "mtp_steps": 2, "checkpoint_every": 1}
    trainer = trainer_of(**settings)
    states = [copies(trainer)]
    for row in trainer.run(tmp_path, CORPUS):
        states.append(copies(trainer))
        if row["step"] == 2:
            break
    # interrupted in the second phase
    resumed = trainer_of(**settings)
    list(resumed.run(tmp_path, CORPUS))
    states.append(copies(resumed))
    first, second, third = (
        {name for name in a if not torch.equal(a[name], b[name])} for a, b in itertools.pairwise(states)
    )
    names = {n for n, _ in trainer.model.named_parameters()}
    routers = {name for name in states[0] if name.endswith("e_score_correction_bias")}
    last = {name for name in names | routers if name.startswith(MTP)}
    assert first == (names | routers) - last
    # weights all of them: each expert is chosen by some token, or decays
    assert last - routers <= second <= last
    assert last - routers <= third <= last


def test_biases_move_toward_balance() -> None:
    trainer = trainer_of(bias_update_speed=0.25)
    for router in trainer.routers:
        router.tokens_per_expert.copy_(torch.tensor([9.0, 1, 2, 4, 4, 4, 4, 4]))
    # of a graph that did not run
    trainer.routers[-1].tokens_per_expert.zero_()
    trainer._balance()
    for bias in biases(trainer.model)[:-1]:
        assert bias.tolist() == [-0.25, 0.25, 0.25, 0, 0, 0, 0, 0]
    assert not biases(trainer.model)[-1].any()
    for ours, theirs in zip(biases(trainer.compute), biases(trainer.model), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(router.tokens_per_expert.any() for router in trainer.routers)


def test_loads_are_those_of_the_step() -> None:
    trainer = trainer_of(bias_update_speed=0.5)
    loads: list[Tensor] = []
    balance = trainer._balance

    def look() -> None:
        loads.append(torch.stack([router.tokens_per_expert for router in trainer.routers]))
        balance()

    trainer._balance = look  # type: ignore[method-assign]
    trainer.train_step(CORPUS)
    tokens = TRAINING.batch_size * TRAINING.seq_len
    assert loads[0].sum(1).tolist() == [tokens * CONFIG.num_experts_per_tok, 0]
    mean = tokens * CONFIG.num_experts_per_tok / 8
    assert torch.equal(biases(trainer.model)[0], 0.5 * (mean - loads[0][0]).sign())


@OF_A_FUNCTION
def test_the_balance_loss_is_in_the_gradients_of_a_step() -> None:
    alpha, L = 0.5, TRAINING.seq_len
    trainer = trainer_of(aux_loss_alpha=alpha, clip_norm=1e9)
    model, logits = model_of(), []
    router = next(m for m in model.modules() if isinstance(m, Router))
    router.register_forward_hook(lambda router, args, out: logits.append(args[0] @ router.weight.T))
    positions = torch.arange(L).repeat(TRAINING.batch_size)
    q_start = torch.arange(0, len(positions) + 1, L, dtype=torch.int32)
    loss = next_token_loss(model, trainer.batch(CORPUS, 0), positions, q_start)
    balance = sequence_balance_loss(logits[0], L, CONFIG.num_experts_per_tok, CONFIG.scoring_func)
    (loss + alpha * balance).backward()
    loss, balance = loss.item(), balance.item()
    assert trainer.train_step(CORPUS) == pytest.approx(loss, rel=1e-6)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # float32 sums of up to 64 tokens in another order: 64 * 2 ** -24 = 4e-6 of the largest
            error = (trainer.masters[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-5, name
            compared += 1
    assert compared > 20
    # the module that did not run has none
    assert trainer.balance_loss() == pytest.approx(balance, rel=1e-6)
    plain = trainer_of(clip_norm=1e9)
    plain.train_step(CORPUS)
    assert plain.balance_loss() is None
    name = "model.layers.1.mlp.gate.weight"
    assert not torch.allclose(plain.masters[name].grad, trainer.masters[name].grad, rtol=1e-2)


@OF_A_FUNCTION
def test_rows_tell_of_the_balance_loss(tmp_path: Path) -> None:
    trainer = trainer_of(steps=2, mtp_steps=1, checkpoint_every=1, aux_loss_alpha=1e-4)
    rows = list(trainer.run(tmp_path, CORPUS))
    assert [1 < row["balance_loss"] < 8 for row in rows] == [True] * 3
    again = trainer_of(steps=2, mtp_steps=1, aux_loss_alpha=1e-4)
    again.resume(tmp_path)
    assert_same_state(again.model.state_dict(), trainer.model.state_dict())


def test_a_balance_loss_that_cannot_be() -> None:
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"training: want a finite aux_loss_alpha >= 0, got {alpha}"):
            Training(steps=1, aux_loss_alpha=alpha).check()
    dense = model_of(replace(CONFIG, n_routed_experts=None))
    with pytest.raises(ValueError, match=r"want a model with routed experts for aux_loss_alpha = 0.1, got none"):
        Trainer(dense, replace(TRAINING, aux_loss_alpha=0.1), compile=False)


def test_biases_of_a_trained_model_are_used() -> None:
    model = model_of()
    for bias in biases(model):
        bias.copy_(torch.randn(8))
    trainer = Trainer(model, TRAINING, compile=False)
    for ours, theirs in zip(biases(trainer.compute), biases(model), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_without_its_last_module() -> None:
    model = CausalLM(CONFIG, mtp_layers=0)
    model.initialize()
    trainer = Trainer(model, replace(TRAINING, mtp_steps=0), compile=False)
    assert [n for n, _ in trainer.compute.named_parameters()] == [n for n, _ in model.named_parameters()]
    with pytest.raises(
        ValueError, match="want a model with a multi-token-prediction module for mtp_steps = 3, got none"
    ):
        Trainer(model, TRAINING, compile=False)


def test_weights_are_float32_and_only_they_are_narrowed() -> None:
    trainer = df.build(
        CONFIG, device="cpu", dtype="bfloat16", training=replace(TRAINING, dtype=torch.bfloat16), compile=False
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.compute.parameters()} == {torch.bfloat16}
    for model in (trainer.model, trainer.compute):
        assert {b.dtype for b in model.buffers()} == {torch.float32}
    for ours, exact in zip(trainer.compute.buffers(), CausalLM(CONFIG).buffers(), strict=True):
        assert torch.equal(ours, exact)
    first = trainer.train_step(CORPUS)
    assert first == pytest.approx(np.log(CONFIG.vocab_size), abs=0.1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert moments and {m.dtype for m in moments} == {torch.float32}


# settings


def test_the_learning_rate_rises_and_falls_in_each_phase() -> None:
    t = Training(steps=50, mtp_steps=30, lr=2.0, min_lr_ratio=0.1, warmup_steps=10)
    rates = [t.lr_at(step) for step in range(80)]
    for begin, end in ((0, 50), (50, 80)):
        assert rates[begin] == pytest.approx(2.0 / 10)
        assert rates[begin + 9] == pytest.approx(2.0) == max(rates[begin:end])
        assert rates[begin:][:10] == sorted(rates[begin:][:10])
        assert rates[begin + 10 : end] == sorted(rates[begin + 10 : end], reverse=True)
        assert rates[end - 1] == pytest.approx(0.1 * 2.0) == min(rates[begin + 10 : end])


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (2, 0), (3, 3), (5, 100), (3, 2)])
def test_learning_rates_of_short_runs(steps: int, warmup_steps: int) -> None:
    t = Training(steps=steps, warmup_steps=warmup_steps, lr=1.0)
    assert all(0 < t.lr_at(step) <= 1.0 for step in range(steps))


@pytest.mark.parametrize("name", ["steps", "batch_size", "seq_len", "checkpoint_every"])
def test_numbers_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=f"training: want {name} >= 1, got 0"):
        Training(**{"steps": 1, name: 0}).check()


def test_too_few_tokens(tmp_path: Path) -> None:
    trainer = trainer_of(steps=1, mtp_steps=0)
    with pytest.raises(ValueError, match=r"trainer: want at least seq_len \+ 3 = 19 tokens, got 18"):
        next(trainer.run(tmp_path, CORPUS[:18]))
    assert torch.equal(trainer.batch(CORPUS[:19], 0), torch.from_numpy(CORPUS[:18].astype(np.int64)).expand(4, -1))


def test_a_batch_is_that_of_its_seed_and_step() -> None:
    trainer = trainer_of()
    tokens = np.arange(1000, dtype=np.uint16)
    batch = trainer.batch(tokens, 5)
    assert batch.shape == (4, 18) and batch.dtype == torch.int64
    assert torch.equal(batch, trainer_of().batch(tokens, 5))
    assert torch.equal(batch.diff(dim=1), torch.ones(4, 17, dtype=torch.int64))
    assert not torch.equal(batch, trainer.batch(tokens, 6))
    assert not torch.equal(batch, trainer_of(seed=1).batch(tokens, 5))
