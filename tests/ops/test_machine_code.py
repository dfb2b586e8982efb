"""Every Triton kernel compiles to sm_90 without spills and within its shared memory, GPU or not.

Kernels whose digest is in a kept table have its machine code; the others are compiled, and one of each source."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deepfuse.__main__ import main
from deepfuse.ops import import_ops
from deepfuse.profiling.compile_kernels import compile_kernels
from deepfuse.profiling.deepseek_v3_arguments import TOKENS, deepseek_v3_arguments
from deepfuse.profiling.kernel_changes import compare
from deepfuse.profiling.kernel_table import KernelTable, installed_triton, read_table, table_of
from deepfuse.profiling.launches import triton_providers
from deepfuse.profiling.machine_code import MachineCode
from deepfuse.profiling.occupancy import CTA_SHARED_BYTES

pytestmark = pytest.mark.slow

import_ops()

WGMMA_OPS = [
    "absorb_query",
    "fp8_matmul",
    "fp8_grouped_matmul",
    "fp8_grouped_matmul_masked",
    "fp8_grouped_matmul_wgrad",
    "grouped_matmul",
    "grouped_matmul_wgrad",
    "head_matmul",
    "mla_attention",
    "mla_attention_backward",
    "mla_decode",
    "mla_decode_fp8",
    "mla_decode_project",
]
"""Ops of matrix products, whose tiles have the 64 rows that Hopper's tensor cores want where the arguments have."""


RESULTS = Path(__file__).parents[2] / "benchmarks/results"
TABLES = {"newest": RESULTS / "kernels.json", "lowest": RESULTS / "kernels_lowest.json"}
"""Of the Triton that each of the requirements names."""
KEPT = {name: read_table(path) for name, path in TABLES.items()}
HERE = next((name for name, table in KEPT.items() if table.triton == installed_triton()), None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def machine_code(cache: Path) -> list[MachineCode]:
    """Every kernel, once for all tests: they are all in this file, which one process runs."""
    return compile_kernels(samples=True, kept=TABLES[HERE] if HERE else None, cache=cache)


def test_no_kernel_spills_registers(machine_code):
    assert [code for code in machine_code if code.spill_bytes] == []


def test_every_kernel_fits_into_shared_memory(machine_code):
    assert [code for code in machine_code if code.shared_bytes > CTA_SHARED_BYTES] == []


def test_every_launcher_was_called(machine_code):
    assert {code.op for code in machine_code} == {op.name for op, _ in triton_providers()}


@pytest.mark.parametrize("name", WGMMA_OPS)
def test_matrix_products_use_the_tensor_cores_of_hopper(machine_code, name):
    assert any(code.wgmma for code in machine_code if code.op == name)


FP8_OPS = ["fp8_matmul", "fp8_grouped_matmul", "fp8_grouped_matmul_masked", "fp8_grouped_matmul_wgrad"]
"""Products of FP8 values, which never leave FP8 on their way to the tensor cores. (`mla_decode_fp8` widens its cache.)"""


def _products(machine_code, op):
    """The kernels of an op that multiply, those that copy for them left out."""
    kernels = [code for code in machine_code if code.op == op and "matmul" in code.kernel]
    assert kernels
    return kernels


@pytest.mark.parametrize("op", FP8_OPS)
def test_products_of_fp8_use_the_tensor_cores_for_fp8(machine_code, op):
    assert [code for code in _products(machine_code, op) if not code.qgmma] == []


@pytest.mark.parametrize("op", FP8_OPS)
def test_products_of_fp8_load_the_next_blocks_while_they_multiply_one(machine_code, op):
    # a sum over one block has no loop
    loops = [code for code in _products(machine_code, op) if code.stages is not None]
    assert loops and [code for code in loops if code.stages < 2] == []
    one_block = [code for code in _products(machine_code, op) if code.stages is None]
    assert all(code.arguments["blocks_a_split"] == "1" for code in one_block)


def test_the_product_of_the_router_has_a_whole_share_of_the_weight_on_its_way(machine_code):
    # of DeepSeek-V3: one token to four have wide tiles, eight and sixteen narrow ones
    wide = [code for code in machine_code if code.op == "router_logits" and code.arguments["BLOCK_D"] == "1024"]
    assert {(code.arguments["BLOCK_T"], code.stages) for code in wide} == {("1", 7), ("2", 7), ("4", 7)}
    narrow = [code for code in machine_code if code.op == "router_logits" and code.arguments["BLOCK_D"] == "256"]
    assert {code.stages for code in narrow if code.arguments["BLOCK_T"] == "16"} == {7}


@pytest.mark.parametrize("kernel", ["_absorb_query_kernel", "_mla_decode_project_kernel"])
def test_products_of_dequantized_weights_load_the_next_block_while_they_multiply_one(machine_code, kernel):
    products = [
        code for code in machine_code if code.kernel == kernel and code.wgmma and code.arguments["FP8"] == "True"
    ]
    assert products and [code for code in products if code.stages is None or code.stages < 2] == []


def test_the_product_that_has_a_warp_for_each_task_fetches_with_tma(machine_code):
    kernels = [code for code in machine_code if code.kernel == "_fp8_matmul_gluon_kernel"]
    shapes = {(code.op, code.arguments["TURNS"]) for code in kernels}
    assert shapes == {(op, turns) for op in ("fp8_matmul", "fp8_grouped_matmul") for turns in ("1", "2")}
    for code in kernels:
        assert code.tma and code.qgmma
        # twelve warps, of which one group of four fetches with 24 registers
        assert code.registers * 32 * 12 <= 65536


def test_every_kernel_is_compiled_for_the_widths_of_deepseek_v3():
    assert {op.name for op, _ in triton_providers()} <= set(deepseek_v3_arguments())


def test_a_kernel_is_compiled_for_every_number_of_tokens_its_op_takes(machine_code):
    tokens = {op: {n for code in machine_code if code.op == op for n in code.tokens} for op in ("rms_norm", "route")}
    assert tokens == {"rms_norm": set(TOKENS), "route": set(TOKENS)}
    # up to sixteen
    assert {n for code in machine_code if code.op == "router_logits" for n in code.tokens} == set(TOKENS[:5])


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_tables_are_of_the_tritons_that_requirements_name(name):
    pinned = (RESULTS.parents[1] / f"requirements/{name}.txt").read_text()
    assert f"\ntriton=={KEPT[name].triton} " in pinned, "`make kernels` writes them anew"
    assert KEPT[name].arch == "sm_90"


needs_a_table = pytest.mark.skipif(HERE is None, reason=f"no table is kept of triton {installed_triton()}")


@pytest.fixture
def kept() -> KernelTable:
    assert HERE is not None
    return KEPT[HERE]


@needs_a_table
def test_kernels_are_those_of_the_kept_table(machine_code, kept):
    changes = compare(kept, table_of(machine_code, "sm_90"))
    assert not changes.changes, f"`make kernels` writes the tables anew, to be seen in review:\n{changes.text()}"


@needs_a_table
def test_the_command_compares_with_a_kept_table(machine_code, kept, cache, monkeypatch, capsys, tmp_path):
    # where the kernels lie compiled
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    op = "append_latent"
    assert any(code.op == op for code in kept.kernels)
    command = ["deepfuse", "kernels", "--op", op, "--json", str(tmp_path / "here.json"), "--against", str(TABLES[HERE])]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert "no kernel differs" in capsys.readouterr().out
    written = json.loads((tmp_path / "here.json").read_text())["kernels"]
    assert written == [row for row in json.loads(TABLES[HERE].read_text())["kernels"] if row["op"] == op]


OP = "rms_norm"
"""With one kernel, which it launches in three ways."""


@pytest.fixture
def its_kernels(kept: KernelTable) -> list[MachineCode]:
    kernels = list(kept.rows(OP).values())
    assert len(kernels) == 3 and len({code.kernel for code in kernels}) == 1
    return kernels


@needs_a_table
def test_what_a_table_has_is_not_compiled(kept, its_kernels, tmp_path):
    *known, stale = its_kernels
    replace(kept, kernels=[*known, replace(stale, digest="0" * 32)]).write(tmp_path / "kept.json")
    found = compile_kernels(op=OP, kept=tmp_path / "kept.json", cache=tmp_path / "triton")
    assert table_of(found, "sm_90").rows().keys() == kept.rows(OP).keys()
    assert {code.digest: code.facts for code in found} == {code.digest: code.facts for code in its_kernels}
    # that of which the table has another digest, and one to see that the digests hold
    assert len(list((tmp_path / "triton").rglob("*.cubin"))) == 2


@needs_a_table
def test_a_table_that_differs_from_what_its_kernels_compile_to_is_refused(kept, its_kernels, cache, tmp_path):
    wrong = [replace(code, registers=code.registers + 8) for code in its_kernels]
    replace(kept, kernels=wrong).write(tmp_path / "kept.json")
    with pytest.raises(RuntimeError, match="the digest .* leaves something out, or the row was changed by hand"):
        compile_kernels(op=OP, kept=tmp_path / "kept.json", cache=cache)
