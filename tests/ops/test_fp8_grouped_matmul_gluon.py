"""Groups in the warp-specialised product: its table of tiles, and its borders, emulated (see `test_fp8_matmul_gluon.py`)."""

import pytest
import torch

from accuracy import same_bits
from deepfuse.ir.interpreter import interpreted
from deepfuse.ops import fp8_grouped_matmul_gluon as grouped
from deepfuse.ops import fp8_matmul_gluon as dense
from deepfuse.ops.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_matmul_ref
from deepfuse.ops.quantize import quantize
from gluon_emulator import EmulatedKernel

E4M3 = torch.float8_e4m3fn


def _arguments(counts, N, K, dtype=torch.float32):
    counts = torch.tensor(counts)
    M, E = int(counts.sum()), len(counts)
    # magnitudes of rows and of experts differ, so that a scale of another shows
    x = torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]
    weight = torch.randn(E, N, K) * torch.logspace(-1, 1, E)[:, None, None] / max(K, 1) ** 0.5
    pairs = quantize(x, E4M3, 1, 128, False), quantize(weight, E4M3, 128, 128, False)
    return *pairs[0], *pairs[1], counts.cumsum(0).to(torch.int32), dtype


def _assert_near(y, arguments):
    expected = fp8_grouped_matmul_ref(*arguments)
    tolerance = 1e-5 if y.dtype == torch.float32 else 2.0**-8
    assert y.dtype == expected.dtype
    assert ((y - expected).float().abs() <= tolerance * expected.abs().amax(1, keepdim=True).float()).all()


@pytest.fixture
def emulated(monkeypatch):
    if not interpreted():
        pytest.skip("emulated where kernels are interpreted; a GPU runs test_on_hopper")
    kernel = EmulatedKernel(dense, dense._fp8_matmul_gluon_kernel)
    monkeypatch.setattr(dense, "_fp8_matmul_gluon_kernel", kernel)
    monkeypatch.setattr(grouped, "processors_of", lambda device: 3)
    return kernel


@pytest.mark.parametrize(
    ("counts", "N", "K", "turns"),
    [
        # groups that end within a part of 64 rows, at its end, and have no row; experts' columns that end within a tile
        ([130, 0, 64, 1, 200], 136, 272, 1),
        ([128, 128], 128, 128, 1),
        # high tiles
        ([700, 900], 72, 144, 2),
        ([0, 0, 1540], 16, 130, 2),
    ],
)
def test_every_row_meets_the_weight_of_its_group(emulated, counts, N, K, turns):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = _arguments(counts, N, K, dtype)
        _assert_near(grouped.launch(*arguments), arguments)
    assert emulated.launches[-1]["TURNS"] == turns


def test_the_gradient_of_the_input(emulated):
    dy, dy_scale = _arguments([100, 70], 80, 144)[:2]
    _, _, weight, weight_scale, offsets, dtype = _arguments([100, 70], 144, 80)
    arguments = (dy, dy_scale, weight.transpose(1, 2), weight_scale.transpose(1, 2), offsets, dtype)
    _assert_near(grouped.launch(*arguments), arguments)


def test_wrong_offsets_reach_nothing_but_the_rows(emulated):
    x, x_scale, weight, weight_scale, _, dtype = _arguments([100, 70], 16, 128)
    for wrong in ([100, 900], [-5, 170], [900, 2], [170, -3]):
        offsets = torch.tensor(wrong, dtype=torch.int32)
        assert grouped.launch(x, x_scale, weight, weight_scale, offsets, dtype).shape == (170, 16)


def test_nothing_to_multiply(emulated):
    x, x_scale, weight, weight_scale, offsets, dtype = _arguments([3, 2], 16, 0)
    assert not grouped.launch(x, x_scale, weight, weight_scale, offsets, dtype).any()
    assert grouped.launch(x[:0], x_scale[:0], weight, weight_scale, offsets * 0, dtype).shape == (0, 16)


def test_is_never_the_first_choice_and_says_where_it_does_not_run():
    providers = {provider.name: provider for provider in fp8_grouped_matmul.providers}
    assert providers["gluon"].priority["cuda"] < providers["triton"].priority["cuda"]
    arguments = _arguments([100, 70], 16, 128, torch.bfloat16)
    assert providers["gluon"].supports(*arguments) is None
    assert "32 rows" in providers["gluon"].supports(*_arguments([10, 20], 16, 128))
    assert "float32" in providers["gluon"].supports(*arguments[:-1], torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="wgmma is of sm_90 alone"
)
@pytest.mark.parametrize(
    ("counts", "N", "K"), [([700, 0, 33, 1000], 4096, 7168), ([64] * 32, 576, 1536), ([4096, 4095], 7168, 2048)]
)
def test_on_hopper(counts, N, K):
    with torch.device("cuda"):
        arguments = _arguments(counts, N, K)
    y = grouped.launch(*arguments)
    expected = fp8_grouped_matmul_ref(*arguments)
    # tensor cores keep 14 bits of a sum of 128 products
    assert ((y - expected).abs() <= 1e-3 * expected.abs().amax(1, keepdim=True)).all()
    assert all(same_bits(y, grouped.launch(*arguments)) for _ in range(10))
