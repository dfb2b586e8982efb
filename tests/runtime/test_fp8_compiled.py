"""Everything in FP8 at once, compiled with all passes: weights, activations, the latent cache, and training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepfuse.blocks.fp8 import to_fp8
from deepfuse.runtime.trainer import Trainer
from deepfuse.runtime.training import Training
from tiny_checkpoint import TINY, model_of
from tiny_model import CONFIG, build, random_weights

pytestmark = pytest.mark.compile
CLOSE = 2e-2
"""Relative error (norm). Inductor sums in another order, and a number at the border between two FP8 values may fall to the
other one, up to 1/8 of itself away: 1/8 / sqrt(32) of a row of 32 numbers. Where none does, it is some 1e-7."""


@pytest.fixture(autouse=True)
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def logits(model: Any) -> Tensor:
    """Of two prompts' last tokens, and of two tokens behind each."""
    engine, prompts = model.engine, [[5, 6, 7, 8, 9], [11]]
    places = [engine.cache.allocate(8) for _ in prompts]
    steps = [engine.prefill(prompts, places, last_only=True)]
    steps += [engine.decode(column, places) for column in ([3, 4], [20, 21])]
    for place in places:
        engine.cache.release(place)
    return torch.stack(steps)


def test_a_model_whose_every_part_is_fp8() -> None:
    one_of_experts = replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
    causal_lm = random_weights(one_of_experts)
    to_fp8(causal_lm)
    plain = build(causal_lm, max_batch_size=2, max_seq_len=64, cache_dtype="fp8")
    compiled = build(causal_lm, max_batch_size=2, max_seq_len=64, cache_dtype="fp8", compile=True)
    assert compiled.report.matches() == plain.report.matches()
    assert compiled.report.matches()["fuse_quantized_experts"] > 0
    assert not compiled.report.warm and compiled.report.recompiles == 0
    assert error(logits(compiled), logits(plain)) < CLOSE
    assert error(logits(build(random_weights(one_of_experts), max_batch_size=2, max_seq_len=64)), logits(plain)) > CLOSE


def test_a_training_step() -> None:
    corpus = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
    training = Training(steps=2, batch_size=2, seq_len=16, lr=1e-3, warmup_steps=1, dtype=torch.float32)

    def trained(compile: bool) -> tuple[float, dict[str, Tensor], float]:
        torch.manual_seed(0)  # of the router's bias
        model = model_of(replace(TINY, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0))
        model.initialize(seed=1)
        one = Trainer(model.train(), training, compile=compile, fp8=True, how={"strict": True})
        loss = one.train_step(corpus)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss, gradients, one.train_step(corpus)

    (loss, gradients, second), (plain_loss, plain_gradients, plain_second) = trained(True), trained(False)
    assert loss == pytest.approx(plain_loss, rel=CLOSE) and second == pytest.approx(plain_second, rel=CLOSE)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 10
    assert max(error(gradients[name], plain_gradients[name]) for name in gradients) < CLOSE
