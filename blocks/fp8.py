"""Linear layers and experts whose weights are FP8, for inference: quantize, dequantize, multiply.

    y = dequantize(quantize(x)) @ dequantize(weight).T        activations in blocks of 1x128, weights of 128x128

That is what the block says; that the product takes the FP8 numbers themselves is a rewrite (``fuse_quantized_matmul``).
With ``activations`` off, x stays as it is and weights alone are FP8.

Which parts are FP8: the linear layers of decoder layers, attention's and the experts'. Embedding, head, norms, router
and the entry of multi-token prediction stay as they are (DeepSeek-V3's own choice).
Names of tensors are those of the checkpoints: ``weight_scale_inv`` is what ``weight`` is multiplied by.
Dims: T tokens, M rows, N outputs, K inputs, E experts, D model width, I expert width, P expert width up to a full block.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.1; README_WEIGHTS of its checkpoint.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.decoder import DecoderLayer
from deepfuse.blocks.linear import Linear, whole
from deepfuse.blocks.moe import Experts
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.quantize import quantize
from deepfuse.ops.swiglu import swiglu

E4M3 = torch.float8_e4m3fn
BLOCK = 128
"""Rows and columns of a weight's block; columns of an activation's."""


class FP8Linear(nn.Module):
    """``[T, K] -> [T, N]``; ``weight [N, K]`` in FP8 and ``weight_scale_inv [ceil(N / 128), ceil(K / 128)]`` float32."""

    stored = ("weight", "weight_scale_inv")
    """Parameters whose dtypes are not the model's."""
    summed: Axis | None = None
    """As of ``Linear``."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, activations: bool = True):
        super().__init__()
        self.activations = activations
        self.weight, self.weight_scale_inv = _storage(out_features, in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        _refuse_gradient(x)
        compute = torch.promote_types(x.dtype, torch.float32) if self.activations else x.dtype
        weight = dequantize(self.weight, self.weight_scale_inv, BLOCK, BLOCK, compute)
        y = linear(_rounded(x, compute) if self.activations else x, weight, None)
        if self.summed is not None:
            return whole(y.to(x.dtype), self.bias, self.summed)
        return (y if self.bias is None else y + self.bias.to(compute)).to(x.dtype)


class FP8Experts(nn.Module):
    """The routed experts' weights in FP8, and their matmuls over rows sorted by expert.

    The gate's rows are followed by zeros up to a full block, and so are those behind it, so that the blocks of the two
    weights on disk are those of the one in memory.
    """

    stored = ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv")

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, *, activations: bool = True):
        super().__init__()
        self.intermediate_size, self.activations = intermediate_size, activations
        self.reads_fp8 = activations
        padded = -(-intermediate_size // BLOCK) * BLOCK
        self.gate_up_proj, self.gate_up_proj_scale_inv = _storage(num_experts, 2 * padded, hidden_size)
        self.down_proj, self.down_proj_scale_inv = _storage(num_experts, hidden_size, intermediate_size)

    def forward(self, rows: Tensor, offsets: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As of ``Experts``."""
        _refuse_gradient(rows)
        gate_up = self._product(rows, self.gate_up_proj, self.gate_up_proj_scale_inv, offsets, quantized)
        gate, up = gate_up.unflatten(-1, (2, -1))[..., : self.intermediate_size].unbind(-2)
        return self._product(swiglu(gate, up), self.down_proj, self.down_proj_scale_inv, offsets)

    def _product(
        self,
        rows: Tensor,
        weight: Tensor,
        scale: Tensor,
        offsets: Tensor,
        quantized: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        compute = torch.promote_types(rows.dtype, torch.float32) if self.activations else rows.dtype
        weight = dequantize(weight, scale, BLOCK, BLOCK, compute)
        x = _rounded(rows, compute, quantized) if self.activations else rows
        return grouped_matmul(x, weight, offsets).to(rows.dtype)


def in_decoder_layers(model: nn.Module) -> set[str]:
    """Names of the linear layers and experts that DeepSeek-V3 has in FP8."""
    names = set()
    for prefix, layer in model.named_modules():
        if isinstance(layer, DecoderLayer):
            # not what a multi-token-prediction module adds to its layer
            for part in ("self_attn", "mlp"):
                found = (n for n, m in layer.get_submodule(part).named_modules() if isinstance(m, Linear | Experts))
                names |= {f"{prefix}.{part}.{n}" for n in found}
    return names


@torch.no_grad()
def to_fp8(model: nn.Module, *, activations: bool = True, wanted: Callable[[str], bool] | None = None) -> list[str]:
    """Put FP8 modules in the place of linear layers and experts, in place; weights that are there are quantized.

    Args:
        model: on any device; on the meta device nothing is computed.
        activations: whether activations are quantized as well.
        wanted: which modules, by name; those of decoder layers where ``None``.

    Returns:
        The names of the modules that were replaced.
    """
    names = in_decoder_layers(model)
    replaced = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear | Experts) or not (name in names if wanted is None else wanted(name)):
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _quantized(module, activations))
        replaced.append(name)
    return replaced


def _quantized(module: Linear | Experts, activations: bool) -> FP8Linear | FP8Experts:
    weight = module.weight if isinstance(module, Linear) else module.down_proj
    with weight.device:
        if isinstance(module, Linear):
            N, K = weight.shape
            made = FP8Linear(K, N, activations=activations)
            made.bias, made.summed = module.bias, module.summed
            put(made.weight, made.weight_scale_inv, weight)
            return made
        E, D, I = weight.shape
        experts = FP8Experts(E, D, I, activations=activations)
        put(experts.down_proj, experts.down_proj_scale_inv, weight)
        for part, rows, blocks in halves(experts):
            source = module.gate_up_proj[:, part * I : (part + 1) * I]
            put(experts.gate_up_proj[:, rows], experts.gate_up_proj_scale_inv[:, blocks], source)
    return experts


def halves(experts: FP8Experts) -> list[tuple[int, slice, slice]]:
    """0 for the gate and 1 for the other; their rows of ``gate_up_proj``; their rows of its scales."""
    width, padded = experts.intermediate_size, experts.gate_up_proj.shape[1] // 2
    blocks = padded // BLOCK
    return [(i, slice(i * padded, i * padded + width), slice(i * blocks, (i + 1) * blocks)) for i in range(2)]


def put(values: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Quantize ``weight [..., N, K]`` into memory for it."""
    if weight.is_meta:
        return
    # a row of blocks at a time: quantization works in float32, with several times its argument
    for i in range(scale.shape[-2]):
        rows = (..., slice(i * BLOCK, (i + 1) * BLOCK), slice(None))
        new_values, new_scale = quantize(weight[rows], E4M3, BLOCK, BLOCK, False)
        values[rows].copy_(new_values)
        scale[..., i : i + 1, :].copy_(new_scale)


def _rounded(x: Tensor, compute: torch.dtype, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
    values, scale = quantize(x, E4M3, 1, BLOCK, False) if quantized is None else quantized
    return dequantize(values, scale, 1, BLOCK, compute)


def _storage(*shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    *leading, N, K = shape
    scale = torch.zeros(*leading, -(-N // BLOCK), -(-K // BLOCK), dtype=torch.float32)
    # zeros: also behind the rows of a padded half
    values = torch.zeros(shape, dtype=torch.uint8).view(E4M3)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(scale, requires_grad=False)


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "FP8 weights: want a call without gradients (torch.no_grad), since FP8 numbers have none; "
            "to train in FP8, build(..., quantize='fp8', training=...)"
        )
