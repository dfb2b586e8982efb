"""What only a GPU can show: kernels against references where they run, and the whole model against the CPU."""

import numpy as np
import pytest
import torch

import deepfuse as df
import deepfuse.runtime.describe
from deepfuse.ir.op import OPS

pytestmark = pytest.mark.gpu

CASES = [
    (op.name, p.name) for op in OPS.values() for p in op.providers if "cuda" in p.priority and p.name != "reference"
]


def _tensors(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "provider"), CASES, ids=str)
def test_provider_agrees_with_reference(name, provider, dtype):
    op = OPS[name]
    implementation = next(p for p in op.providers if p.name == provider)
    tolerance = op.tolerance_for(dtype)
    ran = 0
    for args in op.samples(torch.device("cuda"), dtype):
        if implementation.supports(*args) is not None:
            continue
        ran += 1
        ours, theirs = ([a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(2))
        actual, expected = implementation.fn(*ours), op.reference(*theirs)
        pairs = zip(_tensors([actual, ours]), _tensors([expected, theirs]), strict=True)
        for a, e in pairs:
            torch.testing.assert_close(a, e, atol=tolerance.atol, rtol=tolerance.rtol)
    assert ran, f"{name}.{provider} supports none of its samples"


@pytest.mark.parametrize(("name", "provider"), CASES, ids=str)
def test_provider_repeats_bitwise(name, provider):
    op = OPS[name]
    if op.mutates:
        return
    implementation = next(p for p in op.providers if p.name == provider)
    for args in op.samples(torch.device("cuda"), torch.bfloat16):
        if implementation.supports(*args) is None:
            first = _tensors(implementation.fn(*args))
            for _ in range(10):
                for a, b in zip(first, _tensors(implementation.fn(*args)), strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("compile", [False, True], ids=["uncompiled", "compiled"])
def test_model_agrees_with_the_cpu(compile):
    prompts = [[0, 17, 33, 99, 250], [0, 5]]
    on_cpu = df.build("v3-tiny", device="cpu", dtype="float32", max_batch_size=2, compile=False)
    on_gpu = df.build("v3-tiny", device="cuda", dtype="float32", max_batch_size=2, compile=compile)
    ids = torch.tensor([prompts[0]])
    expected = on_cpu(ids)
    # sums in another order over five layers: a few hundred units of roundoff of the largest logit
    assert (on_gpu(ids).cpu() - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert on_gpu.generate(prompts, max_new_tokens=20, temperature=0.0) == on_cpu.generate(
        prompts, max_new_tokens=20, temperature=0.0
    )
    assert on_gpu.report.recompiles == 0


@pytest.mark.parametrize("training", [False, True], ids=["generation", "training"])
def test_a_profile_knows_the_kernels(training, tmp_path):
    if training:
        trainer = df.build("v3-tiny", device="cuda", training=df.Training(steps=8, batch_size=2, seq_len=64))
        tokens = np.arange(1000, dtype=np.uint16) % trainer.model.config.vocab_size
        with df.profile(trainer, tmp_path / "run") as run:
            for _ in range(8):
                trainer.train_step(tokens)
        assert {"forward", "backward", "optimizer"} <= set(run.graphs)
    else:
        model = df.build("v3-tiny", device="cuda", dtype="bfloat16")
        with df.profile(model, tmp_path / "run") as run:
            model.generate([0, 17, 33], max_new_tokens=12, stop_token_ids=())
        # of a decode step that a CUDA graph replays elsewhere
        assert len(run.steps_of("decode_1")) == 11
    assert run.attributed() >= 0.95
    assert all(span.ended > span.began for step in run.steps for span in step.spans)
