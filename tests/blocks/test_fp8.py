"""FP8 layers, against the recipe in float64 and against the layers they stand for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepfuse.blocks import fp8_training
from deepfuse.blocks.fp8 import FP8Experts, FP8Linear, in_decoder_layers, to_fp8
from deepfuse.blocks.fp8_training import Saved, train_in_fp8
from deepfuse.blocks.linear import Linear
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Experts
from tiny_checkpoint import CONFIGS, TINY, model_of

KINDS: list[Saved] = ["high", "fp8"]


def rounded(x: Tensor, rows: int, cols: int) -> Tensor:
    """What FP8 with a scale for each block makes of ``x``, in float64: DeepSeek-V3, section 3.3.2, written anew."""
    x64, out = x.detach().double().numpy(), np.empty(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], cols):
            block = x64[i : i + rows, j : j + cols]
            scale = np.float32(max(np.abs(block).max(), 1e-4)) / np.float32(448)
            # seven or three bits below the leading one, by the exponent; ties to even, as numpy rounds
            unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(block / scale), 1e-30))), -6) / 8
            out[i : i + rows, j : j + cols] = np.rint(block / scale / unit) * unit * scale
    return torch.from_numpy(out)


def weights(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # rows and columns of very different sizes: one scale for all would be far off
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[-1])


@pytest.mark.parametrize(("T", "N", "K"), [(1, 128, 128), (5, 200, 300), (0, 8, 16), (3, 576, 72)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_recipe(T: int, N: int, K: int, bias: bool) -> None:
    plain = Linear(K, N, bias=bias)
    plain.weight.data = weights(N, K)
    if bias:
        plain.bias.data = weights(N, seed=2)  # type: ignore[union-attr]
    model = nn.Sequential(plain)
    assert to_fp8(model, wanted=lambda name: True) == ["0"]
    x = weights(T, K, seed=1)
    with torch.no_grad():
        got = model(x)
    want = rounded(x, 1, 128) @ rounded(plain.weight, 128, 128).t()
    want = want + plain.bias.detach().double() if bias else want  # type: ignore[union-attr]
    # float32 sums of K exact products: an error of sqrt(K) roundings of a sum as large as their root mean square
    size = rounded(x, 1, 128).norm(dim=-1, keepdim=True) * rounded(plain.weight, 128, 128).norm(dim=-1)
    assert ((got - want).abs() <= 2**-24 * K**0.5 * (size + want.abs())).all()


def test_weights_alone() -> None:
    model = nn.Sequential(Linear(300, 200))
    model[0].weight.data = weights(200, 300)
    want = rounded(model[0].weight, 128, 128).float()
    to_fp8(model, activations=False, wanted=lambda name: True)
    x = weights(5, 300, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ want.t(), rtol=0, atol=0)


@pytest.mark.parametrize("width", [24, 128, 130])
def test_experts_are_linear_layers(width: int) -> None:
    """Gate and up have blocks of their own, whatever the expert's width."""
    E, D = 3, 72
    experts = Experts(E, D, width)
    experts.gate_up_proj.data, experts.down_proj.data = weights(E, 2 * width, D), weights(E, D, width, seed=1) * 1e-4
    model = nn.Sequential(experts)
    rows, offsets = weights(7, D, seed=2), torch.tensor([2, 2, 7], dtype=torch.int32)
    want = []
    for e, part in ((0, slice(0, 2)), (2, slice(2, 7))):
        layers = [Linear(D, width), Linear(D, width), Linear(width, D)]
        gate, up = experts.gate_up_proj[e].detach().chunk(2)
        for layer, weight in zip(layers, (gate, up, experts.down_proj[e].detach()), strict=True):
            layer.weight.data = weight.clone()
        expert = nn.Sequential(*layers)
        to_fp8(expert, wanted=lambda name: True)
        with torch.no_grad():
            want.append(expert[2](torch.nn.functional.silu(expert[0](rows[part])) * expert[1](rows[part])))
    to_fp8(model, wanted=lambda name: True)
    assert isinstance(model[0], FP8Experts)
    with torch.no_grad():
        torch.testing.assert_close(model[0](rows, offsets), torch.cat(want))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_which_parts_are_fp8(config) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    names = set(to_fp8(model))
    kept = {n for n, m in model.named_modules() if isinstance(m, Linear)}
    assert kept <= {"lm_head", f"model.layers.{config.num_hidden_layers}.eh_proj"}
    fp8 = {n for n, m in model.named_modules() if isinstance(m, FP8Linear | FP8Experts)}
    assert fp8 == names == {n for n in names if n.startswith("model.layers.")}
    assert all(p.is_meta for p in model.parameters())
    # a router's weight decides where tokens go
    assert {p.dtype for n, p in model.named_parameters() if ".gate." in n} == {torch.float32}


def test_a_model_keeps_its_places_and_shapes() -> None:
    model = model_of(TINY)
    before = {n: tuple(p.shape) for n, p in model.named_parameters()}
    to_fp8(model)
    after = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.endswith("_scale_inv")}
    experts = {n for n in before if n.endswith("experts.gate_up_proj")}
    assert {n: s for n, s in after.items() if n not in experts} == {n: s for n, s in before.items() if n not in experts}
    # 24 rows each, filled up to a block
    assert {after[n] for n in experts} == {(8, 256, 32)}


def test_a_gradient_is_refused() -> None:
    model = nn.Sequential(Linear(16, 8))
    to_fp8(model, wanted=lambda name: True)
    with pytest.raises(RuntimeError, match="want a call without gradients.*training=") as error:
        model(torch.randn(2, 16, requires_grad=True))
    assert "quantize='fp8'" in str(error.value)
    model(torch.randn(2, 16))


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize(("T", "N", "K"), [(130, 200, 72), (1, 8, 16), (256, 128, 128)])
def test_gradients_are_the_recipe(saved: Saved, T: int, N: int, K: int) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Linear(K, N)

    layer = Layer()
    layer.proj.weight.data = weights(N, K)
    one_layer(layer, saved)
    x, dy = weights(T, K, seed=1).requires_grad_(), weights(T, N, seed=2)
    layer.proj(x).backward(dy)
    dx = rounded(dy, 1, 128) @ rounded(layer.proj.weight, 128, 128)
    read = x if saved == "high" else rounded(x, 1, 128).float()
    dw = rounded(dy, 128, 1).t() @ rounded(read, 128, 1)
    for got, want in ((x.grad, dx), (layer.proj.weight.grad, dw)):
        # float32 sums, of at most 256 terms, in the order of the products' size
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())  # type: ignore[union-attr]


def one_layer(layer: nn.Module, saved: Saved) -> None:
    """Let a module that is no decoder layer train in FP8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_training, "in_decoder_layers", lambda model: {"proj"})
        train_in_fp8(layer, saved=saved)


@pytest.mark.parametrize("saved", KINDS)
def test_experts_gradients_are_those_of_their_linear_layers(saved: Saved) -> None:
    E, D, width = 3, 72, 40
    experts = Experts(E, D, width)
    experts.gate_up_proj.data, experts.down_proj.data = weights(E, 2 * width, D), weights(E, D, width, seed=1) * 1e-4
    model = nn.ModuleDict({"proj": experts})
    one_layer(model, saved)
    # a group's rows share blocks of 128 with no other's: then they are what a layer of its own would have
    rows = weights(300, D, seed=2)
    offsets = torch.tensor([128, 128, 300], dtype=torch.int32)
    x = rows.clone().requires_grad_()
    y = model["proj"](x, offsets)
    dy = weights(300, D, seed=3)
    y.backward(dy)
    for e, part in ((0, slice(0, 128)), (2, slice(128, 300))):
        pieces = [experts.gate_up_proj[e], experts.down_proj[e]]
        layers = []
        for weight in pieces:
            layer = nn.ModuleDict({"proj": Linear(weight.shape[1], weight.shape[0])})
            layer["proj"].weight.data = weight.detach().clone()
            one_layer(layer, saved)
            layers.append(layer["proj"])
        own = rows[part].clone().requires_grad_()
        gate, up = layers[0](own).chunk(2, -1)
        layers[1](torch.nn.functional.silu(gate) * up).backward(dy[part])
        torch.testing.assert_close(x.grad[part], own.grad, rtol=1e-5, atol=1e-5 * own.grad.abs().max().item())  # type: ignore[index,union-attr]
        for got, layer in zip((experts.gate_up_proj.grad, experts.down_proj.grad), layers, strict=True):
            want = layer.weight.grad
            torch.testing.assert_close(got[e], want, rtol=1e-5, atol=1e-5 * want.abs().max().item())  # type: ignore[index]
    assert not experts.gate_up_proj.grad[1].any()  # type: ignore[index]


def test_a_trained_model_keeps_its_parameters() -> None:
    model = model_of(replace(TINY, num_hidden_layers=2))
    before = dict(model.named_parameters())
    trained = train_in_fp8(model)
    assert all(p is before[n] for n, p in model.named_parameters())
    assert len(trained) == len([n for n in in_decoder_layers(model) if not n.endswith("experts")]) + 2 * 2


class MLPs(nn.Module):
    """Layers one behind the other, with ops of ours between."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.experts = MLP(72, 40), Experts(2, 72, 24)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.dense(x * 2), torch.tensor([2, 5], dtype=torch.int32))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's Dynamo does
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", KINDS)
def test_captured_gradients_are_those_of_the_module(
    saved: Saved, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 results are rounded, in float32 they are what the product gives: Dynamo has to see through both."""
    names = {"dense.gate_proj", "dense.up_proj", "dense.down_proj", "experts"}
    monkeypatch.setattr(fp8_training, "in_decoder_layers", lambda model: names)
    model = MLPs()
    assert len(train_in_fp8(model, saved=saved)) == 5
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        x = torch.randn(5, 72, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()
        y = run(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for got, want in zip(results[1], results[0], strict=True):
        assert want.any()
        # the same operations; autograd may add up gradients in another order, and roundings to FP8 then fall elsewhere
        assert (got - want).norm() <= 2**-6 * want.norm()
