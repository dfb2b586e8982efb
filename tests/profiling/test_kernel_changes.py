"""Which differences between two tables of kernels are seen, and which are called worse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepfuse.profiling.kernel_changes import COMPARED, Change, compare
from deepfuse.profiling.kernel_table import KernelTable, read_table, table_of
from deepfuse.profiling.machine_code import Bound, MachineCode

PRODUCT = MachineCode(
    op="fp8_matmul",
    provider="triton",
    kernel="_fp8_matmul_kernel",
    call="float8_e4m3fn[64, 7168] float8_e4m3fn[576, 7168]",
    tokens=[32, 64],
    bounds=[Bound(tokens=64, flops=528482304, bytes=4661248, predicted_us=1.391, limit="memory")],
    constants={"BLOCK_P": "64"},
    digest="d1",
    num_warps=4,
    registers=128,
    spill_bytes=0,
    spill_store_bytes=0,
    spill_load_bytes=0,
    shared_bytes=65536,
    ctas=3,
    matrix={"QGMMA": 8},
    copies={"LDGSTS.128": 12, "STG.32": 4},
    stages=4,
    types={"p_ptr": "*fp8e4nv"},
)
NORM = replace(PRODUCT, op="rms_norm", kernel="_rms_norm_kernel", call="bfloat16[64, 7168]", matrix={}, stages=None)


def table(*kernels: MachineCode, triton: str = "3.9.0", arch: str = "sm_90") -> KernelTable:
    return KernelTable(triton=triton, arch=arch, kernels=list(kernels))


def change(after: MachineCode, before: MachineCode = PRODUCT) -> Change:
    (found,) = compare(table(before), table(after)).changes
    return found


def test_equal_tables_do_not_differ() -> None:
    changes = compare(table(PRODUCT, NORM), table(PRODUCT, NORM))
    assert changes.changes == [] and changes.__rich__() == "no kernel differs"


OTHER: dict[str, Any] = {
    "num_warps": 8,
    "registers": 120,
    "spill_bytes": 16,
    "spill_store_bytes": 16,
    "spill_load_bytes": 24,
    "shared_bytes": 1024,
    "ctas": 4,
    "stages": None,
    "matrix": {"QGMMA": 4},
    "copies": {"LDG.32": 1},
    "constants": {"BLOCK_P": "128"},
    "tokens": [64],
    "bounds": [replace(PRODUCT.bounds[0], predicted_us=2.0)],
}


@pytest.mark.parametrize("name", COMPARED)
def test_each_fact_is_compared(name: str) -> None:
    found = change(replace(PRODUCT, **{name: OTHER[name]}))
    assert (found.kind, found.op, found.kernel) == ("changed", "fp8_matmul", "_fp8_matmul_kernel")
    assert found.what.startswith(f"{name} ") and "->" in found.what and ";" not in found.what.split(" -> ")[0]
    assert bool(found.worse) == name.startswith("spill")


def test_all_but_names_types_and_digests_are_compared() -> None:
    assert set(COMPARED) | {"op", "provider", "kernel", "call", "types", "digest"} == set(
        MachineCode.__dataclass_fields__
    )


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        ({"QGMMA": 8}, {}, "lost QGMMA 8, has no matrix instructions"),
        ({"QGMMA": 8}, {"HGMMA": 8}, "lost QGMMA 8, has HGMMA 8"),
        ({"HGMMA": 8}, {"HMMA": 64}, "lost HGMMA 8, has HMMA 64"),
        ({"UTCQMMA": 8}, {"UTCHMMA": 8}, "lost UTCQMMA 8, has UTCHMMA 8"),
        ({"UTCHMMA": 8}, {"HMMA": 8}, "lost UTCHMMA 8, has HMMA 8"),
        ({"HMMA": 8}, {"HGMMA": 2}, ""),
        ({"HGMMA": 8}, {"QGMMA": 4}, ""),
        ({}, {"HMMA": 1}, ""),
        ({"HGMMA": 8}, {"HGMMA": 4, "HMMA": 2}, ""),
    ],
)
def test_products_that_leave_their_tensor_cores_are_worse(before: Any, after: Any, worse: str) -> None:
    assert change(replace(PRODUCT, matrix=after), replace(PRODUCT, matrix=before)).worse == worse


def test_fewer_spills_are_not_worse() -> None:
    assert change(PRODUCT, replace(PRODUCT, spill_bytes=16, spill_store_bytes=16, spill_load_bytes=16)).worse == ""


def test_new_and_gone() -> None:
    changes = compare(table(PRODUCT), table(NORM)).changes
    assert [(c.kind, c.op, c.worse) for c in changes] == [("new", "rms_norm", ""), ("gone", "fp8_matmul", "")]


def test_a_new_kernel_that_spills_is_worse() -> None:
    (found,) = compare(table(PRODUCT), table(PRODUCT, replace(NORM, spill_bytes=8))).changes
    assert (found.kind, found.worse) == ("new", "spills 8 bytes")


def test_a_new_configuration_is_held_against_the_kernel_s_others() -> None:
    split = replace(PRODUCT, call="float8_e4m3fn[32, 7168]", matrix={"HMMA": 64}, spill_bytes=8)
    (found,) = compare(table(PRODUCT), table(PRODUCT, split)).changes
    assert found.worse == "spills 8 bytes, 0 before, lost QGMMA 8, has HMMA 64"
    # as bad as one that was there
    kept = table(PRODUCT, replace(split, call="float8_e4m3fn[16, 7168]"))
    assert compare(kept, table(*kept.kernels, split)).worse == []


def test_kernels_that_one_call_launches_twice_are_told_apart() -> None:
    again = replace(PRODUCT, registers=64)
    assert compare(table(PRODUCT, again), table(PRODUCT, again)).changes == []
    (found,) = compare(table(PRODUCT, again), table(PRODUCT, replace(again, registers=65))).changes
    assert found.what == "registers 64 -> 65"


def test_the_order_of_compilation_does_not_matter() -> None:
    again = replace(PRODUCT, registers=64)
    kernels = [NORM, PRODUCT, again]
    assert table_of(kernels, "sm_90") == table_of(kernels[::-1], "sm_90")


def test_kernels_of_other_ops_are_left_out() -> None:
    assert compare(table(PRODUCT, NORM), table(NORM), "rms_norm").changes == []


@pytest.mark.parametrize("other", [{"triton": "3.6.0"}, {"arch": "sm_100"}])
def test_a_table_of_another_triton_or_arch_names_both(other: dict[str, str]) -> None:
    kept = table(PRODUCT, **other)
    want = f"want a table of triton 3.9.0 for sm_90, got one of triton {kept.triton} for {kept.arch}"
    with pytest.raises(ValueError, match=want):
        compare(kept, table(PRODUCT))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    sample = replace(NORM, call="", tokens=[], bounds=[])
    replace(table(PRODUCT, NORM), samples=[sample]).write(tmp_path / "kernels.json")
    read = read_table(tmp_path / "kernels.json")
    assert compare(read, table(PRODUCT, NORM)).changes == []
    assert read.kernels == [replace(PRODUCT, types={}), replace(NORM, types={})]
    assert read.samples == [replace(sample, types={})]
    lines = (tmp_path / "kernels.json").read_text().splitlines()
    assert [line for line in lines if '"kernel": "_rms_norm_kernel"' in line] == [lines[2], lines[4]]


def test_kernels_of_samples_alone_are_no_rows() -> None:
    sample = replace(NORM, call="", tokens=[], bounds=[])
    found = table_of([sample, PRODUCT], "sm_90")
    assert found.kernels == [PRODUCT] and found.samples == [sample]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"triton": "3.9.0", "arch": "sm_90", "kernels": [{"op": "x"}], "samples": []}']
)
def test_a_file_that_is_no_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"want a table that `deepfuse kernels --json` wrote, got .*other.json"):
        read_table(tmp_path / "other.json")


def test_the_picture_marks_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=250).print(table(PRODUCT, replace(NORM, spill_bytes=8, spill_store_bytes=4, spill_load_bytes=12)))
    text = capsys.readouterr().out
    product, norm = (line for line in text.splitlines() if "_kernel" in line)
    assert "predicted us, H100" in text and "nothing here was measured" in " ".join(text.split())
    assert all(word in product for word in ("32, 64", "128", "65536", "QGMMA 8", "LDGSTS.128 12", "1.391 memory"))
    assert "4/12" in norm
