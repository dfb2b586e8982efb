"""``build``: from a checkpoint, a preset or a configuration to a compiled model, in one call."""

import contextlib
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from deepfuse.blocks.config import Config
from deepfuse.blocks.load_counter import counting
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel
from deepfuse.blocks.parameters import count_parameters
from deepfuse.ir.device import device_row
from deepfuse.ir.op import OPS
from deepfuse.passes.merge_shared_expert import merge_shared_expert
from deepfuse.passes.pipeline import Pipeline, pipeline_of
from deepfuse.passes.record import Pass
from deepfuse.passes.runner import Runner, strict_by_default
from deepfuse.runtime.agreement import agree, raised_together, setup
from deepfuse.runtime.build_key import graph_key, module_key
from deepfuse.runtime.checkpoint import weights_bytes
from deepfuse.runtime.compile_cache import BuildFolder, cache_root, inductor_cache
from deepfuse.runtime.engine import Engine
from deepfuse.runtime.expert_link import expert_link
from deepfuse.runtime.generation import Sampling, Speed, generate_tokens
from deepfuse.runtime.generation_config import GenerationConfig
from deepfuse.runtime.kept_engine import kept_engine
from deepfuse.runtime.large_prefill import decided, keep, large_prefill
from deepfuse.runtime.latent_cache import (
    FP8,
    LatentCache,
    cache_bytes,
    cached_dtype,
    latent_bytes_per_token,
    mha_bytes_per_token,
)
from deepfuse.runtime.load_model import fp8_summary, load_model, modules_in_fp8
from deepfuse.runtime.lockstep import Lockstep
from deepfuse.runtime.model import Model
from deepfuse.runtime.module import CompiledModule
from deepfuse.runtime.placed import placed
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.report import Report
from deepfuse.runtime.requirements import check_memory, missing_for_compilation
from deepfuse.runtime.source import dtype_of, folder_and_config, place_and_dtype
from deepfuse.runtime.tokenizer import Tokenizer
from deepfuse.runtime.trainer import Trainer
from deepfuse.runtime.training import Training
from deepfuse.runtime.weight_layout import layout_key

QUANTIZE = ("auto", None, "fp8", "fp8_weights")
MAX_SEQ_LEN = 4096
"""Length the cache is made for where the caller names none and the model allows it."""


@raised_together
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
    mesh: DeviceMesh | Mapping[str, int] | None = None,
    parallel: Parallel | None = None,
    timeout_s: float = 60.0,
    count_loads: bool = False,
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
        mesh: processes that build it together, each with its part of the weights: axes ``data`` (each its own prompts, or
            part of a training batch), ``tensor`` (parts of each matrix, the same prompts) and ``expert`` (parts of the
            experts, its own prompts), any of them; or the axes' sizes, as ``{"tensor": 2, "expert": 4}``. Every process
            calls ``build``, and then the model, at the same time.
        parallel: how tokens reach the experts of other processes, and where these are, with a ``mesh``.
        timeout_s: seconds that a process waits for the others, with a ``mesh``, before it says which is missing.
        count_loads: whether the model counts the tokens that each expert gets, for :meth:`Model.expert_loads`.

    Returns:
        A :class:`Model`; a :class:`Trainer` with ``training``; a :class:`CompiledModule` for another module.

    Raises:
        ValueError, TypeError, FileNotFoundError, MemoryError: what was wanted, what came, and what to do.
    """
    began = time.perf_counter()
    # first: they tell one another what each refuses
    processes, wanted = Processes.of(mesh, parallel, device, timeout_s)
    if mesh is not None and isinstance(source, nn.Module):
        raise ValueError(
            "build: want a checkpoint, a preset or a Config over a mesh, of which each process makes its part, got a module"
        )
    if not isinstance(training, Training | None):
        raise TypeError(f"build: want training as a Training, got {training!r:.80}")
    if training is not None and processes.placement is not None:
        raise ValueError(
            "build: want Parallel(placement=...) in inference alone, since copies of an expert would each learn something "
            f"else, got training with {processes.placement!r}"
        )
    if count_loads and (training is not None or not isinstance(source, str | Path | Config | CausalLM)):
        raise ValueError("build: want count_loads for a model that generates, got one to train, or another module")
    for name, switch in (("compile", compile), ("verify", verify), ("strict", strict), ("count_loads", count_loads)):
        if not isinstance(switch, bool) and not (name == "strict" and switch is None):
            raise TypeError(f"build: want {name} as {'None, ' * (name == 'strict')}True or False, got {switch!r:.80}")
    pipeline, forced = pipeline_of(passes), _checked_providers(providers or {})
    how: dict[str, Any] = {
        "strict": strict_by_default() if strict is None else strict,
        "dumps": cache_root() / "failures",
        "verify": verify,
    }
    problem = missing_for_compilation() if compile else None
    notes = [] if problem is None else [f"runs uncompiled: {problem}"]
    if notes:
        compile = False
        warnings.warn(f"build: {notes[0]}", stacklevel=4)  # beyond the decorators
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
    folder, cfg = folder_and_config(source)
    if isinstance(source, CausalLM):
        wanted, dtype = place_and_dtype(source, device, dtype)
    else:
        # masters are float32: FP8 weights dequantized to bfloat16 would be rounded twice
        dtype = torch.float32 if training is not None and dtype == "auto" else dtype_of(dtype, folder)
    # True is an int
    if type(max_batch_size) is bool or not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise ValueError(f"build: want max_batch_size as an integer >= 1, got {max_batch_size!r}")
    length = min(cfg.max_position_embeddings, MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
    if type(length) is bool or not isinstance(length, int) or not 1 <= length <= cfg.max_position_embeddings:
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
    if training is not None and isinstance(source, CausalLM) and fp8_summary(source):
        raise ValueError(
            f"build: want a CausalLM in full precision to train, got one with FP8 weights ({fp8_summary(source)}), which "
            "have no gradient; load it with quantize=None, or train in FP8 with quantize='fp8'"
        )
    online = training is not None and quantize == "fp8"
    in_fp8 = [] if built or training is not None else modules_in_fp8(cfg, folder, quantize, notes)
    counts = count_parameters(cfg)
    room = {"max_batch_size": max_batch_size, "max_seq_len": length}
    row = device_row(wanted)
    link = expert_link(processes, row)
    if mesh is not None:
        alike = {"mesh": processes.axes.sizes, "parallel": processes.parallel, "training": training, "seed": seed}
        alike |= {"dtype": dtype, "quantize": quantize, "cache_dtype": cached, "compile": compile, **room}
        alike |= {
            "verify": verify,
            "strict": how["strict"],
            "count_loads": count_loads,
            "providers": forced,
            "device": row,
            "link": link,
        }
        agree(setup(cfg, folder, pipeline, **alike), timeout_s)
        with processes.raising_together("process groups"):
            processes = processes.with_groups()
    cut = processes.cut
    # only where the pass reads them so: what is not loaded into place is copied, a layer's experts at a time
    with_experts = row.kind == "cuda" and merge_shared_expert.name in pipeline.names and processes.axes.expert is None
    with processes.raising_together("load"):
        # random weights are drawn before they are quantized
        weight_bytes = weights_bytes(cfg, dtype, in_fp8=[] if folder is None else in_fp8, cut=cut)
        check_memory(wanted, 0 if built else weight_bytes, cache_bytes(cfg, cached, **room))
        if isinstance(source, CausalLM):
            causal_lm = source
        else:
            activations = quantize != "fp8_weights"
            laid = None if training is not None else with_experts
            causal_lm = load_model(
                cfg, folder, wanted, dtype, seed, in_fp8=in_fp8, activations=activations, with_experts=laid, cut=cut
            )
    if training is not None:
        with processes.raising_together("compile"):
            trainer = Trainer(
                causal_lm,
                training,
                compile=compile,
                pipeline=pipeline,
                how=how,
                fp8=online,
                providers=forced,
                processes=processes,
            )
            if mesh is not None:
                agree({"overlap": repr(trainer.runner.settings["decided"])}, timeout_s)
        return trainer

    counting(causal_lm, on=count_loads)
    # before a minute of compiling: these files may be damaged as well
    defaults = GenerationConfig() if folder is None else GenerationConfig.from_folder(folder)
    tokenizer = None if folder is None or not (folder / "tokenizer.json").exists() else Tokenizer.from_folder(folder)
    settings = {"providers": forced, "device": row, "max_seq_len": length, "layout": layout_key(causal_lm)}
    settings["link"] = link
    how["meet"] = None if compile else processes.compare
    runner = Runner(pipeline, settings, **{**how, "verify": False})
    kept_apart = {**settings, "strict": runner.strict, "parallel": processes.parallel}
    key = f"{graph_key(pipeline, kept_apart, cfg, dtype, wanted, {**room, 'cache': cached})}-{module_key(causal_lm)}"
    cache = LatentCache(cfg, dtype=cached, device=wanted, **room)
    with processes.raising_together("compile"), inductor_cache() if compile else contextlib.nullcontext():
        if verify:
            trial = Runner(pipeline, settings, **{**how, "meet": processes.compare})
            _verify(causal_lm.eval(), cache, trial, max_batch_size, length, processes.lockstep(wanted))
        kept = BuildFolder(key) if compile else None
        large, why = large_prefill(causal_lm.eval(), cache.layers, runner, processes, kept, max_batch_size)
        if processes.axes.expert is not None:
            agree({"overlap": repr((large, why))}, timeout_s)
        runner.settings = {**settings, "decided": decided(large, why)}
        made = kept_engine(causal_lm, cache, runner, max_batch_size, kept, processes, large)
        if kept is not None and why:
            keep(kept, large, why)
    report = Report(
        model=str(source) if isinstance(source, str | Path) else type(source).__name__,
        device=row.name if wanted.type == "cuda" else str(wanted),
        dtype=str(dtype).removeprefix("torch."),
        parameters=counts.total,
        active_parameters=counts.active,
        mesh="" if mesh is None else str(processes.axes),
        part="" if mesh is None else processes.axes.part_of(cfg, processes.placement),
        placement=None if processes.placement is None else placed(processes.placement, causal_lm),
        quantized=fp8_summary(causal_lm),
        weight_bytes=sum(t.nbytes for t in causal_lm.state_dict().values()),
        cache_dtype="fp8" if cached == FP8 else str(cached).removeprefix("torch."),
        cache_bytes_per_token=latent_bytes_per_token(cfg, cached),
        mha_bytes_per_token=mha_bytes_per_token(cfg, dtype),
        compiled=compile,
        warm=made.from_cache,
        graphs_from_cache=made.graphs_from_cache,
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
        processes=processes,
    )


def _verify(
    causal_lm: CausalLM,
    cache: LatentCache,
    runner: Runner,
    max_batch_size: int,
    max_seq_len: int,
    lockstep: Lockstep,
) -> None:
    """Run every graph, uncompiled, on random tokens; its runner compares values around each pass."""
    trial = Engine(causal_lm, cache, runner, max_batch_size=max_batch_size, folder=None, lockstep=lockstep)
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_new_tokens=2, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=())
    for bucket in trial.buckets:
        prompts = torch.randint(
            causal_lm.config.vocab_size, (bucket, max(min(9, max_seq_len - 2), 1)), generator=generator
        )
        for _ in generate_tokens(trial, prompts.tolist(), sampling, Speed()):
            pass
        trial.finish()


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
