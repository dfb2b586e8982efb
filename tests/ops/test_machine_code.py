"""Every Triton kernel compiles to sm_90 without spills and within its shared memory, GPU or not."""

import pytest

from machine_code import (
    SHARED_BYTES,
    MachineCode,
    deepseek_v3_arguments,
    import_ops,
    read_machine_code,
    triton_providers,
)

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


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> list[MachineCode]:
    return read_machine_code(tmp_path_factory.mktemp("triton"))


def test_no_kernel_spills_registers(machine_code):
    assert [code for code in machine_code if code.spill_bytes] == []


def test_every_kernel_fits_into_shared_memory(machine_code):
    assert [code for code in machine_code if code.shared_bytes > SHARED_BYTES] == []


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
