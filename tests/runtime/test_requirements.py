"""What a machine must have is checked first, and the message says what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch

import deepfuse as df
from deepfuse.runtime import requirements
from deepfuse.runtime.requirements import (
    _left_in_container,
    available_memory,
    check_device,
    check_memory,
    missing_for_compilation,
)
from tiny_checkpoint import TINY

CPU = torch.device("cpu")


def have_cuda_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


# devices


@pytest.mark.parametrize(("count", "kind"), [(0, "cpu"), (1, "cuda")])
def test_auto_takes_a_gpu_where_there_is_one(count: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have_cuda_devices(monkeypatch, count)
    assert check_device("auto") == torch.device(kind)


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == check_device(CPU) == CPU
    have_cuda_devices(monkeypatch, 2)
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert check_device(device) == check_device(torch.device(device)) == torch.device(device)


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:7")])
def test_a_gpu_that_is_not_there(count: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have_cuda_devices(monkeypatch, count)
    with pytest.raises(ValueError, match=rf"want a device that is there \({count} CUDA devices are\), got '{device}'"):
        check_device(device)


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:x", "mps", "meta", "xpu:1"])
def test_devices_that_are_not_supported(device: str) -> None:
    with pytest.raises(ValueError, match=rf"want device 'auto', 'cpu' or 'cuda\[:i\]', got '{device}'"):
        check_device(device)


# memory


def test_too_little_memory_is_said_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "available_memory", lambda: 3 << 30)
    check_memory(CPU, 2 << 30, 1 << 30)
    with pytest.raises(MemoryError) as caught:
        check_memory(CPU, 2 << 30, 3 << 29)
    assert str(caught.value).startswith(
        "build: want 3.50 GiB on cpu (2.00 for weights, 1.50 for the latent cache), got 3.00 GiB free; build with a "
        "smaller max_batch_size"
    )


def test_memory_is_not_checked_where_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert available_memory() is None
    check_memory(CPU, 1 << 60, 0)


def test_free_memory_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:       100 kB\nMemFree:        20 kB\nMemAvailable:   70 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    monkeypatch.setattr(requirements, "_left_in_container", lambda _: None)
    assert available_memory() == 70 * 1024


def test_a_model_too_large_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "available_memory", lambda: 16 << 30)
    with pytest.raises(MemoryError, match=r"want \d{4}\.\d\d GiB on cpu .*, got 16\.00 GiB free"):
        df.build("v3-671b", device="cpu", dtype="bfloat16", compile=False)


# the compiler


def test_nothing_is_missing_where_all_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(requirements.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert missing_for_compilation() is None
    # Inductor takes no other, unless CXX names it
    monkeypatch.setattr(requirements.shutil, "which", lambda name: "/opt/clang++" if name == "clang++" else None)
    assert missing_for_compilation() == "no C++ compiler: install g++ (Debian and Ubuntu: apt-get install g++)"
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert missing_for_compilation() is None
    monkeypatch.setenv("CXX", "g++-99")
    assert str(missing_for_compilation()).startswith(
        "no C++ compiler ('g++-99', which CXX names, is not there): install"
    )


def test_missing_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requirements.shutil, "which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda _: str(tmp_path))
    assert missing_for_compilation() == (
        f"no Python headers in {tmp_path}: install python3-dev (Debian and Ubuntu: apt-get install python3-dev)"
    )


def test_without_a_compiler_a_model_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.shutil, "which", lambda _: None)
    with pytest.warns(UserWarning, match=r"build: runs uncompiled: no C\+\+ compiler: install g\+\+") as caught:
        model = df.build(TINY, device="cpu", max_batch_size=1)
    assert caught[0].filename == __file__
    assert not model.report.compiled
    assert model.report.warnings == [str(caught[0].message).removeprefix("build: ")]
    assert "warning: runs uncompiled: no C++ compiler" in str(model.report)
    assert len(model.generate([1, 2, 3], max_new_tokens=2, stop_token_ids=())) == 2


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 250\n")
    assert _left_in_container(tmp_path) == 350
    monkeypatch.setattr(requirements, "_left_in_container", lambda _: 350)
    assert available_memory() == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_in_container(tmp_path) is None
    assert _left_in_container(tmp_path / "none") is None
