"""``build``: from a checkpoint, a preset or a configuration to a compiled model, in one call."""

import contextlib
import hashlib
import inspect
import platform
import time
import uuid
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepfuse
from deepfuse.blocks import attention, batch, cached_latent, config, decoder, linear, mlp, model, moe, mtp, norm, rotary
from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import E4M3, FP8Experts, FP8Linear, in_decoder_layers, to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parameters import count_parameters
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.device import device_row
from deepfuse.ir.op import OPS
from deepfuse.passes.journal import Journal
from deepfuse.passes.merge_shared_expert import merge_shared_expert
from deepfuse.passes.pipeline import Pipeline, pipeline_of
from deepfuse.passes.record import Pass
from deepfuse.passes.runner import Runner, strict_by_default
from deepfuse.runtime import engine
from deepfuse.runtime.checkpoint import (
    load_weights,
    present_mtp_layers,
    stored_dtype,
    stored_in_fp8,
    weights_bytes,
)
from deepfuse.runtime.compile_cache import BuildFolder, cache_root, inductor_cache
from deepfuse.runtime.config_json import read_config, weight_block_size
from deepfuse.runtime.engine import Engine
from deepfuse.runtime.generation import Sampling, Speed, generate_tokens
from deepfuse.runtime.generation_config import GenerationConfig
from deepfuse.runtime.latent_cache import (
    FP8,
    LatentCache,
    cache_bytes,
    cached_dtype,
    latent_bytes_per_token,
    mha_bytes_per_token,
)
from deepfuse.runtime.model import Model
from deepfuse.runtime.module import CompiledModule
from deepfuse.runtime.report import Report
from deepfuse.runtime.requirements import check_device, check_memory, missing_for_compilation
from deepfuse.runtime.tokenizer import Tokenizer
from deepfuse.runtime.trainer import Trainer, Training
from deepfuse.runtime.weight_layout import groups, lay_side_by_side, layout_key

SHIPPED = Path(deepfuse.__file__).parent / "models"
"""Presets whose weights come with the library lie here, by name."""
QUANTIZE = ("auto", None, "fp8", "fp8_weights")
MAX_SEQ_LEN = 4096
"""Length the cache is made for where the caller names none and the model allows it."""


@torch.inference_mode(False)  # what is made in it can be used in no other mode
def build(
    source: str | Path | Config | nn.Module,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = "auto",
    max_batch_size: int = 8,
    max_seq_len: int | None = None,
    cache_dtype: str = "auto",
    passes: Pipeline | Pass | Iterable[Pass] | None = None,
    providers: Mapping[str, str] | None = None,
    compile: bool = True,
    training: Training | None = None,
    verify: bool = False,
    strict: bool | None = None,
    seed: int = 0,
) -> Any:
    """Build a model: load it, run the passes over its graphs, compile them.

    Args:
        source: a Hugging Face checkpoint directory; a preset (``v3-tiny``, with the weights that come with the library;
            ``v2-lite``, ``v2``, ``v3-671b``, ``kimi-k2``, ``moonlight``, with random weights); a :class:`Config` (random
            weights); a :class:`CausalLM` (used as it is); or any other module (compiled with the passes).
        device: ``auto`` (a :class:`CausalLM`'s own; else CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: of weights and activations; ``auto`` is that of the checkpoint or :class:`CausalLM`, and float32 where
            there is none.
        quantize: ``fp8``: weights of the decoder layers in FP8, quantized as they are loaded, and activations quantized
            at every product (with ``training``: both, from float32 masters, and the gradients as well);
            ``fp8_weights``: weights alone; ``auto``: ``fp8`` for what the checkpoint has in FP8, else nothing (and nothing
            with ``training``); ``None``: nothing, FP8 checkpoints are dequantized.
        max_batch_size: sequences that generate at once; the cache is made for them.
        max_seq_len: tokens a sequence may have; the model's limit, at most 4096, where ``None``.
        cache_dtype: of the latent cache: ``auto``, the dtype of the activations; or ``fp8``, E4M3 with a scale for each 128
            numbers, and rotary keys in bfloat16, 656 bytes per token and layer of DeepSeek-V3 instead of 1152.
        passes: the rewrites; ``deepfuse.passes.default()`` where ``None``. Passes alone are added to these.
        providers: op name -> provider to take first, e.g. ``{"rms_norm": "reference"}``.
        compile: with Inductor; otherwise the same graphs run as the passes left them (for debugging and quick tests).
        training: build a :class:`Trainer` instead of a :class:`Model`.
        verify: check each pass: the rules of the dialect, shapes and dtypes under fake tensors, and values against the
            graph before on real inputs (bitwise for exact passes, within ``ir``'s tolerance for the others). The graphs
            run uncompiled for that, before they are compiled. Values that differ raise, whatever ``strict`` says.
        strict: whether a pass that fails raises; otherwise what it did is undone, with a warning that names a file with
            the graph that broke it. ``None``: as the environment variable ``DEEPFUSE_STRICT`` has it.
        seed: of random weights.

    Returns:
        A :class:`Model`; a :class:`Trainer` with ``training``; a :class:`CompiledModule` for another module.

    Raises:
        ValueError, TypeError, FileNotFoundError, MemoryError: what was wanted, what came, and what to do.
    """
    began = time.perf_counter()
    if not isinstance(training, Training | None):
        raise TypeError(f"build: want training as a Training, got {training!r:.80}")
    pipeline, forced = pipeline_of(passes), _checked_providers(providers or {})
    how: dict[str, Any] = {
        "strict": strict_by_default() if strict is None else strict,
        "dumps": cache_root() / "failures",
        "verify": verify,
    }
    wanted = check_device(device)
    problem = missing_for_compilation() if compile else None
    notes = [] if problem is None else [f"runs uncompiled: {problem}"]
    if notes:
        compile = False
        warnings.warn(f"build: {notes[0]}", stacklevel=3)  # beyond the decorator
    if quantize not in QUANTIZE:
        raise ValueError(f"build: want quantize out of {', '.join(map(repr, QUANTIZE))}, got {quantize!r}")
    if isinstance(source, nn.Module) and not isinstance(source, CausalLM):
        if quantize not in ("auto", None):
            raise ValueError(
                f"build: want quantize 'auto' with a module, which is used as it is, got {quantize!r}; "
                "deepfuse.blocks.fp8.to_fp8(module, wanted=...) quantizes its linear layers"
            )
        if training is not None:
            raise ValueError("build: want a checkpoint, a preset, a Config or a CausalLM to train, got another module")
        if cache_dtype != "auto":
            raise ValueError(f"build: want no cache_dtype for a module that has no latent cache, got {cache_dtype!r}")
        return CompiledModule(source, pipeline, forced, compile=compile, how=how)
    folder, cfg = _folder_and_config(source)
    if isinstance(source, CausalLM):
        wanted, dtype = _place(source, device, dtype)
    else:
        # masters are float32: FP8 weights dequantized to bfloat16 would be rounded twice
        dtype = torch.float32 if training is not None and dtype == "auto" else _dtype(dtype, folder)
    if not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise ValueError(f"build: want max_batch_size as an integer >= 1, got {max_batch_size!r}")
    length = min(cfg.max_position_embeddings, MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
    if not isinstance(length, int) or not 1 <= length <= cfg.max_position_embeddings:
        raise ValueError(
            f"build: want max_seq_len as an integer in 1 .. max_position_embeddings = {cfg.max_position_embeddings}, "
            f"got {length!r}"
        )
    if cfg.attention == "mha" and training is None:
        raise ValueError(
            "build: want attention 'mla', which has a cache to generate from, got 'mha'; it can be trained, or "
            "called as a plain module"
        )
    if training is not None and cache_dtype != "auto":
        raise ValueError(f"build: want no cache_dtype in training, where there is no cache, got {cache_dtype!r}")
    cached = cached_dtype(cache_dtype, cfg, dtype, wanted)
    built = isinstance(source, CausalLM)
    if built and training is None and quantize not in ("auto", None):
        raise ValueError(
            f"build: want quantize 'auto' with a CausalLM, which is used as it is, got {quantize!r}; "
            "deepfuse.blocks.fp8.to_fp8(model) quantizes it"
        )
    if training is not None and quantize == "fp8_weights":
        raise ValueError("build: want quantize 'fp8' to train in FP8, got 'fp8_weights', which have no gradient")
    if training is not None and isinstance(source, CausalLM) and _quantized(source):
        raise ValueError(
            f"build: want a CausalLM in full precision to train, got one with FP8 weights ({_quantized(source)}), which "
            "have no gradient; load it with quantize=None, or train in FP8 with quantize='fp8'"
        )
    online = training is not None and quantize == "fp8"
    in_fp8 = [] if built or training is not None else _in_fp8(cfg, folder, quantize, notes)
    counts = count_parameters(cfg)
    # random weights are drawn before they are quantized
    weight_bytes = weights_bytes(cfg, dtype, in_fp8=[] if folder is None else in_fp8)
    room = {"max_batch_size": max_batch_size, "max_seq_len": length}
    check_memory(wanted, 0 if built else weight_bytes, cache_bytes(cfg, cached, **room))
    row = device_row(wanted)
    # only where the pass reads them so: what is not loaded into place is copied, a layer's experts at a time
    with_experts = row.kind == "cuda" and merge_shared_expert.name in pipeline.names
    if isinstance(source, CausalLM):
        causal_lm = source
    else:
        activations = quantize != "fp8_weights"
        laid = None if training is not None else with_experts
        causal_lm = _weights(
            cfg, folder, wanted, dtype, seed, in_fp8=in_fp8, activations=activations, with_experts=laid
        )
    if training is not None:
        return Trainer(causal_lm, training, compile=compile, pipeline=pipeline, how=how, fp8=online, providers=forced)

    # before a minute of compiling: these files may be damaged as well
    defaults = GenerationConfig() if folder is None else GenerationConfig.from_folder(folder)
    tokenizer = None if folder is None or not (folder / "tokenizer.json").exists() else Tokenizer.from_folder(folder)
    settings = {"providers": forced, "device": row, "max_seq_len": length, "layout": layout_key(causal_lm)}
    runner = Runner(pipeline, settings, **{**how, "verify": False})
    kept_apart = {**settings, "strict": runner.strict}
    key = f"{_key(pipeline, kept_apart, cfg, dtype, wanted, {**room, 'cache': cached})}-{_module_key(causal_lm)}"
    cache = LatentCache(cfg, dtype=cached, device=wanted, **room)
    with inductor_cache() if compile else contextlib.nullcontext():
        if verify:
            _verify(causal_lm.eval(), cache, Runner(pipeline, settings, **how), max_batch_size, length)
        made = _engine(causal_lm.eval(), cache, runner, max_batch_size, BuildFolder(key) if compile else None)
    report = Report(
        model=str(source) if isinstance(source, str | Path) else type(source).__name__,
        device=row.name if wanted.type == "cuda" else str(wanted),
        dtype=str(dtype).removeprefix("torch."),
        parameters=counts.total,
        active_parameters=counts.active,
        quantized=_quantized(causal_lm),
        weight_bytes=sum(t.nbytes for t in causal_lm.state_dict().values()),
        cache_dtype="fp8" if cached == FP8 else str(cached).removeprefix("torch."),
        cache_bytes_per_token=latent_bytes_per_token(cfg, cached),
        mha_bytes_per_token=mha_bytes_per_token(cfg, dtype),
        compiled=compile,
        warm=made.from_cache,
        compile_seconds=made.compile_seconds,
        build_seconds=time.perf_counter() - began,
        journal=runner.journal,
        graphs_at_build=len(runner.journal.graphs),
        warnings=notes,
    )
    return Model(
        made,
        report,
        max_seq_len=length,
        tokenizer=tokenizer,
        defaults=defaults,
        source=None if folder is None else folder.absolute(),  # still right where the program changes its directory
    )


def _engine(
    causal_lm: CausalLM, cache: LatentCache, runner: Runner, max_batch_size: int, folder: BuildFolder | None
) -> Engine:
    """Graphs and their report are kept together: where one is missing or damaged, both are made again."""
    graphs = 1 + len(list(engine.buckets(max_batch_size)))
    kept = None if folder is None else _journal(folder.read_report(), graphs)
    if folder is not None and kept is None:
        folder.discard()
    made = Engine(causal_lm, cache, runner, max_batch_size=max_batch_size, folder=folder)
    if folder is None:
        return made
    if made.from_cache and kept is not None:
        runner.journal.graphs[:] = kept.graphs
        return made
    if len(runner.journal.graphs) < graphs:
        # Inductor had a graph that we had lost: its passes did not run, so that the report would have a gap
        folder.discard()
        runner.journal.graphs.clear()
        runner.salt = uuid.uuid4().hex
        made = Engine(causal_lm, cache, runner, max_batch_size=max_batch_size, folder=folder)
    folder.write_report(runner.journal.to_json())
    return made


def _verify(causal_lm: CausalLM, cache: LatentCache, runner: Runner, max_batch_size: int, max_seq_len: int) -> None:
    """Run every graph, uncompiled, on random tokens; its runner compares values around each pass."""
    trial = Engine(causal_lm, cache, runner, max_batch_size=max_batch_size, folder=None)
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_new_tokens=2, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=())
    for bucket in trial.buckets:
        prompts = torch.randint(
            causal_lm.config.vocab_size, (bucket, max(min(9, max_seq_len - 2), 1)), generator=generator
        )
        for _ in generate_tokens(trial, prompts.tolist(), sampling, Speed()):
            pass


def _journal(report: Any, graphs: int) -> Journal | None:
    """The kept report of so many graphs; ``None`` where it is damaged."""
    try:
        journal = Journal.from_json(report)
    except (AttributeError, KeyError, TypeError):
        return None
    return journal if len(journal.graphs) == graphs else None


def check_chat_template(source: str | Path) -> None:
    """Raise the error of ``Model.chat`` for a checkpoint or preset without a chat template, before it is built."""
    folder, _ = _folder_and_config(source)
    if folder is not None and (folder / "tokenizer.json").exists():
        Tokenizer.from_folder(folder).chat([{"role": "user", "content": ""}])


def _folder_and_config(source: str | Path | Config | CausalLM) -> tuple[Path | None, Config]:
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


def _in_fp8(cfg: Config, folder: Path | None, quantize: str | None, notes: list[str]) -> set[str]:
    """Names of the modules that are to be FP8."""
    if quantize is None:
        return set()
    names, partly = (set(), set()) if folder is None else stored_in_fp8(folder, cfg)
    if quantize != "auto":
        with torch.device("meta"):
            return names | in_decoder_layers(CausalLM(cfg))
    if partly:
        block = weight_block_size(cfg)
        why = (
            "some of their weights are not in FP8"
            if block == (128, 128)
            else f"their blocks are {block}, not (128, 128)"
        )
        first = ", ".join(sorted(partly)[:3]) + (", ..." if len(partly) > 3 else "")
        notes.append(f"FP8 weights of {len(partly)} modules are dequantized: {why} ({first})")
    return names


def _quantized(causal_lm: CausalLM) -> str:
    """What a report says of a model's FP8 modules."""
    modules = [m for m in causal_lm.modules() if isinstance(m, FP8Linear | FP8Experts)]
    kinds = {"fp8" if m.activations else "fp8_weights" for m in modules}
    return f"{' and '.join(sorted(kinds))}: {len(modules)} modules" if modules else ""


def _weights(
    cfg: Config,
    folder: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    in_fp8: Collection[str],
    activations: bool,
    with_experts: bool | None = None,
) -> CausalLM:
    """``with_experts``: whether a shared expert lies behind the routed ones; ``None``: every weight lies by itself."""
    if folder is not None:
        present = present_mtp_layers(folder, cfg)
        with torch.device("meta"):
            causal_lm = CausalLM(cfg, mtp_layers=present)
            to_fp8(causal_lm, activations=activations, wanted=in_fp8.__contains__)
        together = () if with_experts is None else groups(causal_lm, with_experts=with_experts)
        load_weights(causal_lm, folder, device=device, dtype=dtype, together=together)
        return causal_lm
    # made in its dtype and place: in float32 first it would take twice the memory that was checked
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            causal_lm = CausalLM(cfg)
    finally:
        torch.set_default_dtype(default)
    causal_lm.initialize(seed)
    to_fp8(causal_lm, activations=activations, wanted=in_fp8.__contains__)
    if with_experts is not None:
        lay_side_by_side(causal_lm, with_experts=with_experts)
    return causal_lm


def _place(
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
    if dtype != "auto" and _dtype(dtype, None) != own_dtype:
        raise ValueError(f"build: want a CausalLM in {dtype}, got one in {own_dtype}; convert it first")
    return own_device, own_dtype


def _dtype(dtype: str | torch.dtype, folder: Path | None) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if folder is None else stored_dtype(folder)
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"build: want dtype 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return wanted


def _checked_providers(providers: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(providers, Mapping):
        raise TypeError(f"build: want providers as a mapping from op to provider, got {providers!r:.80}")
    for name, provider in providers.items():
        if name not in OPS:
            raise ValueError(f"build: want providers for ops out of {', '.join(sorted(OPS))}, got {name!r}")
        names = [p.name for p in OPS[name].providers]
        if provider not in names:
            raise ValueError(f"build: want a provider of {name} out of {', '.join(names)}, got {provider!r}")
    return dict(sorted(providers.items()))


def _key(
    pipeline: Pipeline,
    settings: Mapping[str, Any],
    cfg: Config,
    dtype: torch.dtype,
    device: torch.device,
    room: Mapping[str, Any],
) -> str:
    """Of everything a captured graph depends on."""
    modules = (attention, batch, cached_latent, config, decoder, linear, mlp, model, moe, mtp, norm, rotary, engine)
    parts = [
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        pipeline.key(sorted(settings.items())),
        repr(cfg),
        f"{dtype} {device} {sorted(room.items())}",
        *(inspect.getsource(m) for m in modules),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _module_key(causal_lm: CausalLM) -> str:
    """Of what a captured graph takes for granted of a module, and does not check at a call.

    Configuration and dtype do not settle it: a module may come with a router bias in bfloat16 (after ``.bfloat16()``),
    with a setting changed by hand, or with blocks of the caller's own.
    """
    parts = []
    for name, module in causal_lm.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        parts.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {sorted(settings.items())}")
    for name, tensor in (*causal_lm.named_parameters(), *causal_lm.named_buffers()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}")
    for kind in sorted({type(m) for m in causal_lm.modules()}, key=lambda t: (t.__module__, t.__qualname__)):
        try:
            parts.append(inspect.getsource(inspect.getmodule(kind) or kind))
        except (OSError, TypeError):  # typed into a prompt: there is no file, but there is the code
            functions = [f.__code__ for f in vars(kind).values() if inspect.isfunction(f)]
            parts.append(repr([(c.co_name, c.co_code, c.co_consts, c.co_names) for c in functions]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
