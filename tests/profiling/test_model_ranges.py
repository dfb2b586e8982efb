"""NVTX ranges of a model, as a tool hears them; those of a compiled one are heard in tests/profiling/test_profile.py."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import deepfuse as df
from deepfuse.__main__ import main
from deepfuse.profiling.model_ranges import ranged
from deepfuse.profiling.nvtx import COLORS
from deepfuse.runtime.cuda_graph import CudaGraph
from nvtx_log import Listener, heard_from
from tiny_checkpoint import TINY
from tiny_model import build, checkpoint

PROMPT = [5, 6, 7]
PROGRAM = """
import sys
import deepfuse as df
from tiny_model import CONFIG, build

model = build(CONFIG)
for _ in range(2):
    with df.profile(model, nvtx=True) as run:
        model.generate([5, 6, 7], max_new_tokens=3, stop_token_ids=())
    assert not run.steps
    model.generate([5, 6, 7], max_new_tokens=3, stop_token_ids=())
    sys.modules["nvtx"] = None
"""


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """First through the package nvtx, then as if it were missing."""
    if not torch.backends.cuda.is_built():
        pytest.skip("PyTorch built without CUDA has no torch.cuda.nvtx, half of what is heard here")
    heard = heard_from(PROGRAM, tmp_path_factory.mktemp("nvtx"))
    again = [i for i, h in enumerate(heard) if h.name == "prefill"][1]
    return heard[:again], heard[again:]


def generate(model):
    return model.generate(PROMPT, max_new_tokens=3, stop_token_ids=())


@pytest.mark.slow
def test_an_uncompiled_model_has_ranges_by_block_and_op(heard):
    pytest.importorskip("nvtx", reason="of the extra nvtx")
    heard, _ = heard
    assert {h.domain for h in heard} == {"deepfuse"}
    assert {(h.depth, h.category) for h in heard} == {(0, "graph"), (1, "block"), (2, "op"), (1, "op")}
    # behind the block there are none
    assert [h.name for h in heard if h.depth == 0] == ["prefill", "decode_1", "decode_1"]
    prefill = [h for h in heard[: heard.index(next(h for h in heard if h.name == "decode_1"))]]
    first, last = (
        next(i for i, h in enumerate(prefill) if h.category == "block" and h.name == name)
        for name in ("layers.1.self_attn", "layers.1.mlp")
    )
    attention = [h for h in prefill[first:last] if h.color == f"{COLORS['attention']:08x}"]
    assert [h.name.removeprefix("layers.1.self_attn") for h in attention[:4]] == [
        "",
        ".q_a_proj.linear",
        ".q_a_layernorm.rms_norm",
        ".q_b_proj.linear",
    ]
    colors = {h.name: h.color for h in prefill}
    for name, kind in {"layers.0.mlp": "mlp", "layers.1.mlp": "experts", "lm_head": "embedding"}.items():
        assert colors[name] == f"{COLORS[kind]:08x}"


@pytest.mark.slow
def test_without_the_package_pytorchs_ranges_have_the_names(heard):
    _, heard = heard
    assert {(h.domain, h.color, h.category) for h in heard} == {("", "", "")}
    names = [(h.depth, h.name) for h in heard]
    assert names[0] == (0, "prefill")
    at = names.index((1, "layers.1.self_attn"))
    assert names[at + 1] == (2, "layers.1.self_attn.q_a_proj.linear")


@pytest.fixture(scope="module")
def model():
    return build(checkpoint())


def test_what_is_computed_stays_the_same_and_nothing_stays_behind(model):
    expected, listener = generate(model), Listener()
    with ranged(model, listener):
        assert generate(model) == expected
    heard = len(listener.heard)
    assert heard > 100 and listener.open == []
    assert generate(model) == expected and len(listener.heard) == heard
    # and again
    with ranged(model, listener):
        assert generate(model) == expected
    assert len(listener.heard) == 2 * heard


def test_numbers_and_views_have_no_ranges(model):
    listener = Listener()
    with ranged(model, listener):
        generate(model)
    ops = {name.rpartition("/")[2].rpartition(".")[2] for name in listener.heard}
    assert not ops & {"view", "split_with_sizes", "_assert_scalar", "ge", "getitem"}


def test_a_block_that_fails_leaves_the_model_as_it_was(model):
    expected, listener = generate(model), Listener()
    with pytest.raises(RuntimeError, match="mine"), ranged(model, listener):
        generate(model)
        raise RuntimeError("mine")
    heard = len(listener.heard)
    assert generate(model) == expected and len(listener.heard) == heard


def test_one_at_a_time(model):
    listener = Listener()
    with ranged(model, listener):
        generate(model)
        with pytest.raises(ValueError, match="want one profile at a time"), ranged(model, Listener()):
            generate(model)
        listener.heard.clear()
        generate(model)
        assert "decode_1/lm_head/lm_head.linear" in listener.heard


def test_a_step_that_would_be_replayed_is_launched(model, monkeypatch):
    """A replay runs no Python, and so no range: the step it was recorded of does."""
    replayed = object.__new__(CudaGraph)
    monkeypatch.setattr(replayed, "launched", model.engine._decode[1], raising=False)
    monkeypatch.setitem(model.engine._decode, 1, replayed)
    listener = Listener()
    with ranged(model, listener):
        generate(model)
    assert listener.heard.count("decode_1") == listener.heard.count("decode_1/lm_head/lm_head.linear") == 2


def test_ranges_alone_take_any_model_of_ours(model):
    with df.profile(model, nvtx=True) as run:
        generate(model)
    assert run.steps == [] and run.dtype == "float32"
    with pytest.raises(ValueError, match="want a compiled model"), df.profile(model, "run", nvtx=True):
        pass
    with pytest.raises(TypeError, match="want what deepfuse.build returns, got dict"), df.profile({}, nvtx=True):
        pass


def test_steps_of_training():
    training = df.Training(steps=9, batch_size=2, seq_len=16, dtype=torch.float32)
    corpus = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
    config = replace(TINY, num_hidden_layers=1, num_nextn_predict_layers=0)
    trainers = [df.build(config, device="cpu", training=training, compile=False) for _ in range(2)]
    listener = Listener()
    with ranged(trainers[0], listener):
        seen = [trainers[0].train_step(corpus) for _ in range(2)]
    heard = len(listener.heard)
    assert listener.open == []
    # nothing is done twice, and nothing is heard behind the block
    assert [*seen, trainers[0].train_step(corpus)] == [trainers[1].train_step(corpus) for _ in range(3)]
    assert len(listener.heard) == heard
    parts = ["copy_weights", "forward", "backward", "optimizer"]
    # the first step has ranges of its parts alone
    assert listener.heard[:5] == [*parts, "copy_weights"]
    assert {"forward/lm_head/lm_head.linear", "backward/lm_head/lm_head.linear_backward"} <= {*listener.heard[5:]}
    refused = pytest.raises(ValueError, match="want no directory with nvtx=True for a Trainer")
    with refused, df.profile(df.build(config, device="cpu", training=training), "run", nvtx=True):
        pass


@torch.no_grad()
def test_a_module():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    compiled, listener = df.build(module, compile=False), Listener()
    x = torch.randn(2, 4)
    expected = compiled(x)
    with ranged(compiled, listener):
        assert torch.equal(compiled(x), expected)
    assert listener.heard == ["forward", "forward/0", "forward/0/0.linear", "forward/1", "forward/1/1.relu"]
    compiled(x)
    assert len(listener.heard) == 5


def test_the_command(model, monkeypatch, tmp_path, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["deepfuse", "profile", "tiny", "--prompt", "the fox", "--nvtx", *arguments])
        main()
        return capsys.readouterr().out

    monkeypatch.setattr("deepfuse.runtime.build.build", lambda *_, **__: model)
    assert run("--steps", "3") == "3 steps with NVTX ranges; to record them, add --out\n"
    assert run("--steps", "3", "--json") == '{"steps": 3, "recorded": 0}\n'
    # before anything is built
    monkeypatch.setattr("deepfuse.runtime.build.build", None)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(SystemExit):
        run()
    assert 'got neither; pip install "deepfuse[nvtx]"' in capsys.readouterr().err
