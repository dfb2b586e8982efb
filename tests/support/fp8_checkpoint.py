"""A checkpoint whose linear layers are random FP8, and what they mean in float64."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_checkpoint import TINY, change, load


def e4m3(bits: np.ndarray) -> np.ndarray:
    """Values of E4M3 numbers (OCP 8-bit floating point, section 5) in float64."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float64)
    value = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    )
    return np.where(bits & 128, -value, value)


def write_fp8(folder: Path, block: tuple[int, int], fused: bool = False) -> dict[str, np.ndarray]:
    """Give a checkpoint random FP8 weights; returns what they mean, in float64."""
    rng, meant = np.random.default_rng(0), {}

    def edit(tensors: dict[str, Tensor]) -> None:
        if fused:
            tensors |= {n: t for n, t in load(folder).state_dict().items() if n.endswith(("gate_up_proj", "down_proj"))}
            for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
                del tensors[name]
        names = [n for n in tensors if "proj" in n and "eh_proj" not in n]
        for name in names:
            *batch, N, K = tensors[name].shape
            bits = rng.integers(0, 256, (*batch, N, K), dtype=np.uint8)
            bits[(bits & 127) == 127] = 0  # NaN
            scale = rng.uniform(1e-4, 1e-2, (*batch, -(-N // block[0]), -(-K // block[1]))).astype(np.float32)
            n, k = np.indices((N, K))
            meant[name] = e4m3(bits) * scale.astype(np.float64)[..., n // block[0], k // block[1]]
            tensors[name] = torch.from_numpy(bits).view(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.from_numpy(scale)

    change(folder, edit)
    path = folder / "config.json"
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return meant


WIDE = replace(TINY, hidden_size=192, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=130, moe_intermediate_size=72)
"""``kv_a_proj_with_mqa`` is [576, 192]: four blocks of 128 rows and a half by one and a half."""
