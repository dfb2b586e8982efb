"""The warp-specialised product: its barriers and its arithmetic emulated, since no interpreter runs Gluon."""

import pytest
import torch

import gluon_emulator
from accuracy import same_bits
from deepfuse.ir.interpreter import interpreted
from deepfuse.ops import fp8_matmul_gluon as module
from deepfuse.ops.fp8_matmul import fp8_matmul, fp8_matmul_ref
from deepfuse.ops.quantize import quantize
from gluon_emulator import EmulatedKernel, Emulator

E4M3 = torch.float8_e4m3fn


def _operands(M, N, K):
    a, b = torch.randn(M, K), torch.randn(N, K) / max(K, 1) ** 0.5
    # magnitudes of rows and of blocks differ, so that a scale of another shows
    a *= torch.logspace(-2, 2, M)[:, None]
    return *quantize(a, E4M3, 1, 128, False), *quantize(b, E4M3, 128, 128, False)


@pytest.fixture
def emulated(monkeypatch):
    if not interpreted():
        pytest.skip("emulated where kernels are interpreted; a GPU runs test_on_hopper")
    kernel = EmulatedKernel(module, module._fp8_matmul_gluon_kernel)
    monkeypatch.setattr(module, "_fp8_matmul_gluon_kernel", kernel)
    return kernel


@pytest.mark.parametrize("turns", [1, 2])
# one tile, one block; several tiles a program, more blocks than stages; K that ends within a block; sizes that fill nothing
@pytest.mark.parametrize(
    ("M", "N", "K", "processors"), [(256, 128, 128, 4), (300, 264, 1024, 2), (129, 136, 208, 3), (65, 8, 130, 132)]
)
def test_is_the_dequantized_product(emulated, monkeypatch, turns, M, N, K, processors):
    monkeypatch.setattr(module, "processors_of", lambda device: processors)
    monkeypatch.setattr(module, "turns_of", lambda *_: turns)
    operands = _operands(M, N, K)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        emulated.seed = 100 * seed
        y = module.launch(*operands, dtype)
        expected = fp8_matmul_ref(*operands, 128, None, None, dtype)
        # rows differ by four decimal places, which one tolerance would not do justice
        magnitude = expected.abs().amax(1, keepdim=True).float()
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
        assert y.dtype == dtype and ((y - expected).float().abs() <= tolerance * magnitude).all()
    launched = emulated.launches[-1]
    assert launched["TURNS"] == turns and launched["grid"][0] <= processors


def test_scales_and_operands_of_other_strides(emulated):
    a, a_scale, b, b_scale = _operands(130, 72, 260)
    wide = torch.zeros(72, 300, dtype=torch.uint8).view(E4M3)
    wide[:, 7:267] = b
    y = module.launch(
        a.t().contiguous().t(), a_scale.contiguous(), wide[:, 7:267], b_scale.t().contiguous().t(), torch.float32
    )
    assert same_bits(y, module.launch(a, a_scale, b, b_scale, torch.float32))


def _never_waits(names):
    names["mbarrier"].wait = lambda barrier, parity: None


def _frees_after_one_group(names):
    init = names["mbarrier"].init
    names["mbarrier"].init = lambda barrier, count: init(barrier, 1)


def _forgets_a_fence(names):
    names["fence_async_shared"] = lambda: None


def _writes_over_what_is_being_written(names):
    names["tma"].store_wait = lambda left: None


@pytest.mark.parametrize(
    "fault", [_never_waits, _frees_after_one_group, _forgets_a_fence, _writes_over_what_is_being_written]
)
def test_a_fault_would_show(emulated, monkeypatch, fault):
    monkeypatch.setattr(module, "processors_of", lambda device: 1)
    monkeypatch.setattr(module, "turns_of", lambda *_: 2)
    operands = _operands(300, 264, 1024)
    expected = module.launch(*operands, torch.float32)
    original = Emulator.names

    def with_fault(self):
        names = original(self)
        fault(names)
        return names

    monkeypatch.setattr(Emulator, "names", with_fault)
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 2.0)
    try:
        actual = module.launch(*operands, torch.float32)
    except (AssertionError, TimeoutError):
        return
    assert not torch.equal(actual, expected)


@pytest.mark.usefixtures("emulated")
def test_nothing_to_multiply():
    a, a_scale, b, b_scale = _operands(70, 16, 0)
    assert torch.equal(module.launch(a, a_scale, b, b_scale, torch.float32), torch.zeros(70, 16))
    assert module.launch(a[:0], a_scale[:0], b, b_scale, torch.bfloat16).shape == (0, 16)


def test_tiles_are_high_where_that_costs_no_round():
    # of 132 processors: 16 x 17 high tiles take three rounds, 32 x 17 low ones five of half the length
    assert module.turns_of(4096, 2112, 132) == 1
    assert module.turns_of(4096, 4096, 132) == 2
    assert module.turns_of(128, 7168, 132) == 1


def test_is_never_the_first_choice():
    operands = _operands(256, 128, 256)
    arguments = (*operands, 128, None, None, torch.bfloat16)
    gluon = next(provider for provider in fp8_matmul.providers if provider.name == "gluon")
    assert gluon.supports(*arguments) is None
    assert gluon.priority["cuda"] < min(
        p.priority["cuda"] for p in fp8_matmul.providers if p.name in ("triton", "torch")
    )


def test_says_where_it_does_not_run():
    supports = next(provider for provider in fp8_matmul.providers if provider.name == "gluon").supports
    a, a_scale, b, b_scale = _operands(256, 128, 256)

    def refusal(*operands, b_rows=128, bias=None, residual=None, dtype=torch.bfloat16):
        return supports(*operands, b_rows, bias, residual, dtype)

    assert "up to 64 rows" in refusal(a[:64], a_scale[:64], b, b_scale)
    assert "float32 scales" in refusal(a, a_scale.to(torch.float8_e8m0fnu), b, b_scale.to(torch.float8_e8m0fnu))
    assert "E4M3" in refusal(a.to(torch.float8_e5m2), a_scale, b, b_scale)
    assert "128 rows" in refusal(a, a_scale, b, b_scale[:1].expand(128, 2), b_rows=1)
    assert "adds nothing" in refusal(a, a_scale, b, b_scale, bias=torch.ones(128))
    assert "16 bytes" in refusal(a, a_scale, b[:124], b_scale)
    assert "float32" in refusal(a, a_scale, b, b_scale, dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="wgmma is of sm_90 alone"
)
@pytest.mark.parametrize(("M", "N", "K"), [(128, 576, 7168), (4096, 2112, 7168), (4000, 4096, 1552), (65, 136, 208)])
def test_on_hopper(M, N, K):
    with torch.device("cuda"):
        operands = _operands(M, N, K)
    y = module.launch(*operands, torch.float32)
    expected = fp8_matmul_ref(*operands, 128, None, None, torch.float32)
    # tensor cores keep 14 bits of a sum of 128 products
    assert ((y - expected).abs() <= 1e-3 * expected.abs().amax(1, keepdim=True)).all()
    assert all(same_bits(y, module.launch(*operands, torch.float32)) for _ in range(10))
