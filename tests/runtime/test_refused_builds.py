"""What build refuses before it begins, and what it warns of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deepfuse as df
from deepfuse.runtime import build as build_module
from deepfuse.runtime import requirements
from deepfuse.runtime.checkpoint import CheckpointError
from tiny_model import ONE_LAYER, build, random_weights

REFUSED = {
    "unknown preset": (
        lambda: df.build("v4"),
        FileNotFoundError,
        "build: want a checkpoint directory or a preset out of v3-tiny, .*, got 'v4'",
    ),
    "unknown path": (lambda: df.build(Path("/nowhere/at all")), FileNotFoundError, "got '/nowhere/at all'"),
    "a file": (lambda: df.build(__file__), FileNotFoundError, "want a checkpoint directory or a preset"),
    "dtype": (
        lambda: build(ONE_LAYER, dtype="float8"),
        ValueError,
        "want dtype 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'",
    ),
    "dtype of torch": (lambda: build(ONE_LAYER, dtype=torch.int8), ValueError, "want dtype .* got torch.int8"),
    "no sequences": (
        lambda: build(ONE_LAYER, max_batch_size=0),
        ValueError,
        "want max_batch_size as an integer >= 1, got 0",
    ),
    "too long": (
        lambda: build(ONE_LAYER, max_seq_len=513),
        ValueError,
        "want max_seq_len as an integer in 1 .. max_position_embeddings = 512, got 513",
    ),
    "no length": (
        lambda: build(ONE_LAYER, max_seq_len=0),
        ValueError,
        "want max_seq_len as an integer in 1 .. .*, got 0",
    ),
    "provider of no op": (
        lambda: build(ONE_LAYER, providers={"rms": "triton"}),
        ValueError,
        "want providers for ops out of .*rms_norm.*, got 'rms'",
    ),
    "no such provider": (
        lambda: build(ONE_LAYER, providers={"rms_norm": "cuda"}),
        ValueError,
        "want a provider of rms_norm out of reference, triton, got 'cuda'",
    ),
    "pass": (
        lambda: build(ONE_LAYER, passes=df.passes.default().without("lowr")),
        ValueError,
        "passes: want a name out of lower, got 'lowr'",
    ),
    "device": (lambda: build(ONE_LAYER, device="tpu"), ValueError, "want device 'auto', 'cpu' or 'cuda.*, got 'tpu'"),
    "device not there": (
        lambda: build(ONE_LAYER, device="cuda:99"),
        ValueError,
        r"want a device that is there \(\d+ CUDA devices are\), got 'cuda:99'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_built_is_refused(name, monkeypatch):
    def made(*_, **__):
        raise AssertionError("weights were made before the check")

    monkeypatch.setattr(build_module, "load_model", made)
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        df.build(tmp_path)


def test_too_little_memory_is_seen_before_anything_is_made(monkeypatch):
    def made(*_, **__):
        raise AssertionError("weights were made before the check")

    monkeypatch.setattr(build_module, "load_model", made)
    monkeypatch.setattr(requirements, "available_memory", lambda: 1 << 20)
    with pytest.raises(
        MemoryError, match=r"build: want 0\.\d\d GiB on cpu \(0\.\d\d for weights, .*, got 0\.00 GiB free"
    ):
        build(replace(ONE_LAYER, vocab_size=5000, hidden_size=512))


def test_memory_of_a_model_that_is_there_is_not_asked_for_again(monkeypatch):
    asked = []
    monkeypatch.setattr(build_module, "check_memory", lambda device, weights, cache: asked.append((weights, cache)))
    build(random_weights(ONE_LAYER))
    # two pages of 64 tokens with 32 numbers of 4 bytes
    assert asked == [(0, 2 * 64 * 32 * 4)]


def test_a_machine_without_headers_runs_uncompiled(monkeypatch):
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.warns(UserWarning, match="build: runs uncompiled: no Python headers in /nowhere: install python3-dev"):
        model = build(ONE_LAYER, compile=True)
    assert not model.report.compiled and "no Python headers" in model.report.warnings[0]
    assert "warning: runs uncompiled: no Python headers" in str(model.report)
    assert model(torch.tensor([[5, 6, 7]])).isfinite().all()
