"""What ``build`` is given: where its weights and configuration lie, and the place and dtype that are asked for."""

from pathlib import Path

import torch

from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import E4M3, FP8Experts, FP8Linear
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.presets import PRESETS
from deepfuse.runtime.checkpoint import stored_dtype
from deepfuse.runtime.config_json import read_config
from deepfuse.runtime.requirements import check_device
from deepfuse.runtime.tokenizer import Tokenizer

SHIPPED = Path(__file__).parents[1] / "models"
"""Presets whose weights come with the library lie here, by name."""


def folder_and_config(source: str | Path | Config | CausalLM) -> tuple[Path | None, Config]:
    if isinstance(source, Config):
        return None, source
    if isinstance(source, CausalLM):
        return None, source.config
    if not isinstance(source, str | Path):
        raise TypeError(f"build: want a path, a preset, a Config or a module, got {source!r:.80}")
    if str(source) in PRESETS:
        folder = SHIPPED / str(source)
        if (folder / "config.json").exists():
            return folder, read_config(folder)
        return None, PRESETS[str(source)]()
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"build: want a checkpoint directory or a preset out of {', '.join(PRESETS)}, got {str(source)!r}"
        )
    return Path(source), read_config(Path(source))


def check_chat_template(source: str | Path) -> None:
    """Raise the error of ``Model.chat`` for a checkpoint or preset without a chat template, before it is built."""
    folder, _ = folder_and_config(source)
    if folder is not None and (folder / "tokenizer.json").exists():
        Tokenizer.from_folder(folder).chat([{"role": "user", "content": ""}])


def place_and_dtype(
    causal_lm: CausalLM, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Where a module lies and in which dtype: it is used as it is, and what else is asked for is refused."""
    modules = [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, FP8Linear | FP8Experts)]
    fp8 = {f"{n}.{p}": m.get_parameter(p) for n, m in modules for p in m.stored}
    converted = [n for n, p in fp8.items() if p.dtype != (torch.float32 if n.endswith("_scale_inv") else E4M3)]
    if converted:
        raise ValueError(
            f"build: want FP8 weights in float8_e4m3fn with float32 scales, got {converted[0]} in {fp8[converted[0]].dtype}; "
            "convert the model first, and then call to_fp8"
        )
    places = {(p.device, p.dtype) for n, p in causal_lm.named_parameters() if n not in fp8}
    own_device, own_dtype = next(iter(places))
    if len(places) > 1 or own_device.type == "meta":
        found = ", ".join(sorted(f"{d} {t}" for d, t in places))
        raise ValueError(f"build: want a CausalLM with all weights on one device and of one dtype, got {found}")
    asked = own_device if device == "auto" else check_device(device)
    if asked.type != own_device.type or asked.index not in (None, own_device.index):
        raise ValueError(f"build: want a CausalLM on {asked}, got one on {own_device}; move it there first")
    if dtype != "auto" and dtype_of(dtype, None) != own_dtype:
        raise ValueError(f"build: want a CausalLM in {dtype}, got one in {own_dtype}; convert it first")
    return own_device, own_dtype


def dtype_of(dtype: str | torch.dtype, folder: Path | None) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if folder is None else stored_dtype(folder)
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"build: want dtype 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return wanted
