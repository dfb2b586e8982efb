"""The cases and alternatives of the benchmark of FP8 products, on the CPU; only its clock wants a GPU."""

from types import SimpleNamespace

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.ir.provider import Provider

products = load_script("fp8_products")


def test_every_case_is_the_product_in_bfloat16_but_for_quantization():
    cases = [*products.dense([3, 70], [(32, 256)]), *products.grouped([(2, 40)], [(24, 128)])]
    assert [case[0] for case in cases] == ["3 x 32 x 256", "70 x 32 x 256", *["2 x 40 x 24 x 128"] * 2]
    for _, op, args, bf16 in cases:
        expected = bf16().float()
        # three bits of mantissa in each operand
        error = (op.reference(*args).float() - expected).norm() / expected.norm()
        assert 1e-3 < error < 6e-2


def test_alternatives_are_the_providers_that_take_the_arguments():
    def names(M, dtype):
        (_, op, args, _) = next(iter(products.dense([M], [(32, 256)])))
        # of a CUDA tensor only its device is looked at
        x = SimpleNamespace(device=SimpleNamespace(type="cuda"))
        able = SimpleNamespace(
            providers=[
                Provider(
                    name=p.name, fn=p.fn, priority=p.priority, supports=lambda _, p=p: p.supports(*args[:-1], dtype)
                )
                for p in op.providers
            ]
        )
        return list(products.alternatives(able, (x,)))

    assert names(70, torch.bfloat16) == ["triton", "gluon", "torch"]
    assert names(16, torch.bfloat16) == ["triton"]
    assert names(70, torch.float32) == ["triton", "gluon"]
    assert names(70, torch.float64) == ["reference"]


def test_rows_have_figures_of_every_alternative(monkeypatch):
    monkeypatch.setattr(products, "alternatives", lambda op, args: {"reference": lambda: op.reference(*args)})

    def seconds(fn, *, rounds, cold):
        assert fn().shape == (3, 32)
        return 2e-6 if cold else 1e-6

    rows = products.measure(products.dense([3], [(32, 256)]), seconds, 5)
    assert [row["provider"] for row in rows] == ["reference", "bfloat16"]
    assert rows[0]["cold us"] == 2.0 and rows[0]["warm us"] == 1.0
    assert rows[0]["cold TFLOP/s"] == pytest.approx(2 * 3 * 32 * 256 / 2e-6 / 1e12)
    assert products.table(rows).row_count == 2
