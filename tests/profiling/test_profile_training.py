"""A profiled training: forward and backward by module and op, the optimizer in a row, and steps that stay what they were."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo

import deepfuse as df
from deepfuse.__main__ import main
from deepfuse.profiling.model_ranges import ranged
from deepfuse.profiling.roofline import roofline
from deepfuse.profiling.run import GUARDS, WRAPPER, Run
from deepfuse.runtime.build_options import BuildOptions
from deepfuse.runtime.checkpoint import save_checkpoint
from nvtx_log import Listener
from tiny_checkpoint import TINY

CONFIG = replace(TINY, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
CORPUS = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
TRAINING = df.Training(steps=50, batch_size=2, seq_len=16, dtype=torch.float32)


def trainer_of(**options):
    return df.build(CONFIG, device="cpu", training=TRAINING, **options)


def losses(trainer, steps):
    return [trainer.train_step(CORPUS) for _ in range(steps)]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Runs of a trainer from an empty cache and of one from a filled one, and the losses of both and of a third."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root))
        runs, seen = [], []
        for name in ("cold", "warm"):
            torch._dynamo.reset()
            trainer = trainer_of()
            with df.profile(trainer, root / name, warmup=1) as run:
                seen.append(losses(trainer, 5))
            runs.append(run)
            # without passes run again, there is no journal to read names from
            assert bool(trainer.runner.journal.graphs) == (name == "cold")
        assert Run.read(root / "warm") == runs[1]
        yield trainer, runs, [*seen, losses(trainer_of(), 5)]


@pytest.mark.compile
def test_kernels_of_forward_and_backward_have_module_and_op(profiled):
    _, runs, seen = profiled
    for run in runs:
        assert run.graphs == ["copy_weights", "forward", "backward", "optimizer"]
        # the first finds the code, the second warms it up
        assert [len(run.steps_of(graph)) for graph in run.graphs] == [3] * 4
        assert run.attributed() >= 0.95
        # every kernel of the tiny model, whatever its share
        unknown = [
            part for kernels in run.parts.values() for kernel in kernels for part in kernel if not part.attributed
        ]
        assert not unknown
        places = {graph: {row.name for row in run.rows("place") if row.graph == graph} for graph in run.graphs}
        assert {
            "layers.0.self_attn.mla_attention",
            "layers.0.mlp.experts.grouped_matmul",
            "lm_head.linear",
            WRAPPER,
            GUARDS,
        } <= places["forward"]
        assert {
            "layers.0.self_attn.mla_attention_backward",
            "layers.0.mlp.experts.grouped_matmul_wgrad",
            "layers.0.self_attn.q_a_proj.linear_backward",
            "lm_head.linear_backward",
            WRAPPER,
            GUARDS,
        } <= places["backward"]
        assert places["optimizer"] == {"(optimizer)"} and places["copy_weights"] == {"(copy_weights)"}
        for step in run.steps:
            ends = [step.code_began, *(t for s in step.spans for t in (s.began, s.ended)), step.code_ended]
            assert ends == sorted(ends) and step.began <= step.code_began <= step.code_ended <= step.ended
        # one part of a step after the other
        times = [t for step in run.steps for t in (step.began, step.ended)]
        assert times == sorted(times)
    assert runs[0].parts == runs[1].parts, "names survive in Inductor's cache"
    assert seen[0] == seen[1] == seen[2], "a profile changes no step"


@pytest.mark.compile
def test_gradients_of_linear_layers_have_their_costs(profiled):
    _, runs, _ = profiled
    head = next(row for row in roofline(runs[0], "place") if row.name == "lm_head.linear_backward")
    T, D, V = TRAINING.batch_size * TRAINING.seq_len, CONFIG.hidden_size, CONFIG.vocab_size
    # dx = dy @ weight and dweight = dy.T @ x, each with its two operands and its result
    assert head.flops == 2 * (2 * T * D * V) and head.bytes == 4 * 2 * (T * V + V * D + T * D)


@pytest.mark.compile
def test_what_ends_a_profile_of_training(profiled, tmp_path):
    trainer, _, _ = profiled
    with pytest.raises(ValueError, match=r"want more than 1 \+ warmup = 3 steps of training"), df.profile(trainer):
        losses(trainer, 3)
    with pytest.raises(RuntimeError, match="mine"), df.profile(trainer, tmp_path / "run"):
        losses(trainer, 4)
        raise RuntimeError("mine")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="high <= 0"), df.profile(trainer):
        trainer.train_step(CORPUS[:4])
    with pytest.raises(ValueError, match="want one profile at a time"), df.profile(trainer):
        losses(trainer, 1)
        with df.profile(trainer):
            losses(trainer, 1)
    # nothing of all that is left
    with df.profile(trainer, warmup=1, steps=1) as run:
        losses(trainer, 4)
    assert [len(run.steps_of(graph)) for graph in run.graphs] == [1] * 4
    assert json.dumps(run.json())


def test_uncompiled_training_is_refused():
    message = "want a compiled model, got one built with compile=False"
    with pytest.raises(ValueError, match=message), df.profile(trainer_of(compile=False)):
        pass


@pytest.mark.compile
def test_the_command(profiled, monkeypatch, tmp_path, capsys):
    trainer, _, _ = profiled
    monkeypatch.setattr(BuildOptions, "build", lambda self, model, training: trainer)
    save_checkpoint(trainer.model, tmp_path / "model")
    options = ["--train", "--steps", "2", "--seq-len", "16", "--json"]
    monkeypatch.setattr("sys.argv", ["deepfuse", "profile", str(tmp_path / "model"), *options])
    main()
    data = json.loads(capsys.readouterr().out)
    assert data["attributed"] >= 0.95 and len(data["steps"]) == 4 * 2
    assert {row["graph"] for row in data["rows"]["op"]} == {"copy_weights", "forward", "backward", "optimizer"}
    message = "want a Model for shapes, memory or stacks, got a Trainer"
    with pytest.raises(TypeError, match=message), df.profile(trainer, tmp_path / "run", shapes=True):
        pass


@pytest.mark.compile
def test_ranges_of_a_step(profiled):
    trainer, listener = profiled[0], Listener()
    with ranged(trainer, listener):
        losses(trainer, 2)
    heard = len(listener.heard)
    assert listener.open == []
    # the first step has ranges of its parts alone
    assert listener.heard[:5] == ["copy_weights", "forward", "backward", "optimizer", "copy_weights"]
    ops = [name.split("/")[::2] for name in listener.heard[5:] if name.count("/") == 2]
    assert any(graph == "forward" and "layers.0.self_attn.q_a_proj.linear" in op for graph, op in ops)
    assert any(graph == "backward" and "layers.0.self_attn.q_a_proj.linear_backward" in op for graph, op in ops)
    losses(trainer, 1)
    assert len(listener.heard) == heard
