"""Arguments of ops, from ``meta`` tensors: random numbers where nothing else is asked, and indices that are right.

What an integer means is in its parameter's name, which ops share. Strides stay as they are.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.op import Op
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import packed_rows

Given = Mapping[str, Any]
"""Parameter -> what was given for it, its tensors ``meta``."""


def real(op: Op, args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The same shapes, dtypes and strides on a device.

    Raises:
        ValueError: the op has an integer parameter of a name that is not known here.
    """
    given = dict(zip(inspect.signature(op.reference).parameters, args, strict=True))
    return tuple(
        _filled(op.name, name, value, given).to(device) if isinstance(value, Tensor) else value
        for name, value in _on(device, given).items()
    )


def _on(device: torch.device, given: Given) -> Given:
    """Room for each tensor; a cache has a page for each entry of its table."""
    pages = given["block_table"].numel() + 1 if "block_table" in given else 0
    found = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            size = (max(pages, value.shape[0]), *value.shape[1:]) if name == "cache" else value.shape
            value = torch.empty_strided(size, value.stride(), dtype=value.dtype, device=device)
        found[name] = value
    return found


def _filled(op: str, name: str, x: Tensor, given: Given) -> Tensor:
    if name == "cache" and x.dtype == torch.uint8:
        return _fp8_cache(x, given)
    if not x.is_floating_point():
        if name not in INDICES:
            raise ValueError(f"arguments: want integers out of {', '.join(INDICES)}, got {name} of {op}")
        return x.copy_(INDICES[name](given).to(x.dtype))
    if x.dtype.itemsize == 1:
        return x.copy_(torch.randn(x.shape, dtype=torch.bfloat16, device=x.device))
    # scales, temperatures and probabilities: positive, near one; and the logarithm of a sum that is no smaller than its terms
    if "scale" in name or name in ("temperature", "top_p"):
        return x.uniform_(0.5, 1.0)
    return x.fill_(100.0) if name == "lse" else x.normal_()


def _fp8_cache(x: Tensor, given: Given) -> Tensor:
    """Rows as they are written, since not all bytes are numbers: the widths are those of the queries or of what is written."""
    if "q_latent" in given:
        C, R = given["q_latent"].shape[-1], given["q_rope"].shape[-1]
    elif "k_rope" in given:
        C, R = given["latent"].shape[-1], given["k_rope"].shape[-1]
    else:
        C = given["rank"]
        R = (x.shape[-1] - C - 4 * ((C + 127) // 128)) // 2
    for page in x.split(1024):
        rows = page.shape[0] * PAGE_SIZE
        packed = packed_rows(torch.randn(rows, C, device=x.device), torch.randn(rows, R, device=x.device))
        page.copy_(packed.unflatten(0, (-1, PAGE_SIZE)))
    return x


def _ends(given: Given) -> Tensor:
    M, E = given.get("x", given.get("dy")).shape[0], given["offsets"].shape[0]
    return torch.arange(1, E + 1) * M // E


def _experts(given: Given) -> Tensor:
    T, K = given["experts"].shape
    return torch.rand(T, given["num_experts"]).argsort(1)[:, :K]


def _order(given: Given) -> Tensor:
    return torch.randperm(given["order"].shape[0], generator=torch.Generator().manual_seed(0))


INDICES: dict[str, Callable[[Given], Tensor]] = {
    "offsets": _ends,
    "counts": lambda g: torch.full(g["counts"].shape, g["x"].shape[1]),
    "slots": lambda g: torch.randperm(g["cache"].shape[0] * PAGE_SIZE)[: g["slots"].shape[0]],
    "block_table": lambda g: 1 + torch.randperm(g["block_table"].numel()).reshape(g["block_table"].shape),
    "seqlens": lambda g: torch.full(g["seqlens"].shape, g["block_table"].shape[1] * PAGE_SIZE),
    "experts": _experts,
    "order": _order,
    "inverse": lambda g: _order(g).argsort(),
    "q_start": lambda g: torch.tensor([0, g["q"].shape[0]]),
    "k_start": lambda g: torch.tensor([0]),
    "k_len": lambda g: torch.tensor([g["kv"].shape[0]]),
    "top_k": lambda g: torch.full(g["top_k"].shape, 50),
    "seed": lambda g: torch.arange(g["seed"].shape[0]),
    "position": lambda g: torch.arange(g["position"].shape[0]),
}
"""Parameter -> its values: groups of one size, rows and pages that lie anywhere, full pages and rooms."""
