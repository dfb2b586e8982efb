"""What `deepfuse kernels` refuses, before it compiles anything; what it compiles is in `tests/ops/test_machine_code.py`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfuse.__main__ import main
from deepfuse.ir.device import H100
from deepfuse.ir.op import OPS
from deepfuse.ops import import_ops
from deepfuse.profiling import compile_kernels as module
from deepfuse.profiling.compile_kernels import check_request, compile_kernels
from deepfuse.profiling.deepseek_v3_arguments import deepseek_v3_arguments
from deepfuse.profiling.kernel_table import KernelTable, installed_triton
from deepfuse.profiling.launches import triton_providers
from deepfuse.profiling.machine_code import MachineCode, bound_of, call_text

import_ops()


def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints as it fails, without compiling: one line."""
    monkeypatch.setattr("sys.argv", ["deepfuse", "kernels", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    # rich 13.9 ends a progress bar that was never shown with an empty line
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> list[MachineCode]:
        raise AssertionError("compiles")

    monkeypatch.setattr(module, "compile_kernels", refuse)


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "rms_nrm"], "want an op that has a Triton kernel (rms_norm"),
        (["--op", "linear"], "want an op that has a Triton kernel, got 'linear', which has none"),
        (["--arch", "sm_80"], "want arch sm_90 or sm_100, got 'sm_80'"),
        (
            ["--against", "/does/not/exist.json"],
            "want a table that `deepfuse kernels --json` wrote, got /does/not/exist.json (No such file or directory)",
        ),
        (
            ["--json", "/does/not/exist.json"],
            "want --json to be a file in a folder that exists, got /does/not/exist.json",
        ),
        (["--json", "/"], "want --json to be a file in a folder that exists, got /"),
    ],
)
def test_what_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error(monkeypatch, capsys, *arguments)


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("other", [{"triton": "3.0.0"}, {"arch": "sm_100"}])
def test_a_table_of_another_triton_or_arch(
    other: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = {"triton": installed_triton(), "arch": "sm_90", "kernels": [], **other}
    KernelTable(**fields).write(tmp_path / "kept.json")
    line = error(monkeypatch, capsys, "--against", str(tmp_path / "kept.json"))
    assert f"want a table of triton {installed_triton()} for sm_90, got one of triton {fields['triton']} for" in line


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="want the package triton, which comes with torch on Linux, got none"):
        check_request("sm_90", None)


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # a process that fails before it has compiled anything
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="want all kernels compiled, got exit status 1"):
        compile_kernels(op="append_latent", cache=tmp_path)


def test_a_kernel_that_becomes_worse_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = dict.fromkeys(MachineCode.__dataclass_fields__, 0) | {"op": "rms_norm", "kernel": "k", "call": "x"}
    fields |= {"tokens": [1], "bounds": [], "types": {}, "constants": {}, "matrix": {}, "copies": {}}
    kept, found = (MachineCode(**{**fields, "spill_bytes": n}) for n in (0, 8))
    KernelTable(triton=installed_triton(), arch="sm_90", kernels=[kept]).write(tmp_path / "kept.json")
    monkeypatch.setattr(module, "compile_kernels", lambda *args, **kwargs: [found])
    line = error(monkeypatch, capsys, "--against", str(tmp_path / "kept.json"), "--json", str(tmp_path / "new.json"))
    assert line.endswith(f"want none worse than in {tmp_path / 'kept.json'}, got 1")
    # it is written all the same
    assert json.loads((tmp_path / "new.json").read_text())["kernels"][0]["spill_bytes"] == 8


def test_gluon_is_for_hopper() -> None:
    names = {arch: {(op.name, provider.name) for op, provider in triton_providers(arch)} for arch in (90, 100)}
    assert names[90] - names[100] == {("fp8_matmul", "gluon"), ("fp8_grouped_matmul", "gluon")}
    assert names[100] < names[90]


def test_a_bound_is_the_larger_of_arithmetic_and_memory() -> None:
    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = bound_of(OPS["rms_norm"], (t(64, 7168), t(7168), 1e-6), 64, H100)
    # in, out and weight, two bytes each, at 3.35 TB/s
    assert norm.bytes == 2 * (2 * 64 * 7168 + 7168)
    assert norm.limit == "memory" and norm.predicted_us == pytest.approx(norm.bytes / 3.35e6, rel=1e-3)
    calls = deepseek_v3_arguments()["fp8_matmul"]
    tokens, args = max(calls, key=lambda call: OPS["fp8_matmul"].cost(*call[1]).flops)
    product = bound_of(OPS["fp8_matmul"], args, tokens, H100)
    (M, K), N = args[0].shape, args[2].shape[0]
    assert product.flops == 2 * M * N * K and product.limit == "compute"
    # at the rate of FP8
    assert product.predicted_us == pytest.approx(product.flops / 1979e6, rel=1e-3)


def test_a_call_in_words() -> None:
    args = (torch.empty(2, 3, device="meta"), None, 1e-6, torch.bfloat16, True)
    assert call_text(args) == "float32[2, 3] None 1e-06 bfloat16 True"
