"""A small trainer: next-token loss, AdamW with a cosine schedule, one compiled step, checkpoints to resume from.

    weights and moments in float32; forward and backward on a copy in ``dtype``, gradients added up in float32;
    in FP8, the linear layers and experts quantize the float32 weights themselves (``blocks/fp8_training.py``)
    expert bias after each step: b_e += bias_update_speed * sign(mean load - load_e)     (no auxiliary loss)
    gradient of aux_loss_alpha * the sequence-wise balance loss of each router           (``blocks/balance.py``)

Over processes, those with tokens of their own (axes ``data`` and ``expert``) each take a part of every batch and have parts
of masters and moments (``blocks/data_parallel.py``); a step is that of one process with the whole batch.

Dims: B sequences, L tokens a sequence, T = B * L.
Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2 (bias), 2.2 (multi-token prediction), 4.2 (optimizer).
"""

import contextlib
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.balance import SequenceBalance
from deepfuse.blocks.capacity import drop_counts
from deepfuse.blocks.collectives import sum_over
from deepfuse.blocks.data_parallel import to_data_parallel
from deepfuse.blocks.fp8_training import train_in_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Router
from deepfuse.ir.device import device_row
from deepfuse.ir.private import sizes_from_data, with_own_code
from deepfuse.passes.journal import naming
from deepfuse.passes.pipeline import Pipeline, default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.choose_overlap import Choice, choose
from deepfuse.runtime.expert_link import expert_link
from deepfuse.runtime.gradient_norm import clip_gradients
from deepfuse.runtime.heartbeat import watched
from deepfuse.runtime.losses import mtp_loss, next_token_loss
from deepfuse.runtime.overlap_form import Form, in_form
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.trainer_checkpoint import read_state, write_state
from deepfuse.runtime.training import Training


class Trainer:
    """Trains a model on a stream of tokens."""

    def __init__(
        self,
        model: CausalLM,
        training: Training,
        *,
        compile: bool = True,
        pipeline: Pipeline | None = None,
        how: Mapping[str, Any] | None = None,
        fp8: bool = False,
        providers: Mapping[str, str] | None = None,
        processes: Processes | None = None,
    ):
        """``model`` is trained in place, in float32; without ``compile`` the step's graphs run as the passes left them.

        ``pipeline``: the passes, ``default()`` where ``None``; ``how``: what else the runner of the passes is told;
        ``fp8``: whether the decoder layers' products are in FP8; ``providers``: op name -> provider to take first;
        ``processes``: of whom ``model`` is this one's part.
        """
        training.check()
        self.model, self.training = model, training
        self.processes = processes or Processes()
        self.tokens = self.processes.tokens_axis()
        if training.batch_size % self.token_processes:
            raise ValueError(
                f"trainer: want batch_size a multiple of the {self.token_processes} processes of axes data and expert, "
                f"got {training.batch_size}"
            )
        mtp_layers = len(model.model.layers) - model.config.num_hidden_layers
        if training.mtp_steps and not mtp_layers:
            raise ValueError(
                f"trainer: want a model with a multi-token-prediction module for mtp_steps = {training.mtp_steps}, got none"
            )
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        # parameters alone are narrowed: the buffers (rotary frequencies, expert biases) mean what they are
        self.device = next(model.parameters()).device
        self.compute = copy.deepcopy(model).requires_grad_().train()
        self.routers = [m for m in self.compute.modules() if isinstance(m, Router)]
        if training.aux_loss_alpha:
            if not self.routers:
                raise ValueError(
                    f"trainer: want a model with routed experts for aux_loss_alpha = {training.aux_loss_alpha}, got none"
                )
            for router in self.routers:
                # the mean over all sequences is that of the processes' means
                router.balance = SequenceBalance(
                    training.aux_loss_alpha / self.token_processes,
                    training.seq_len,
                    sequences=training.batch_size // self.token_processes,
                )
        in_fp8 = set(map(id, train_in_fp8(self.compute, saved=training.fp8_saved))) if fp8 else set()
        quantized = {name for name, parameter in self.compute.named_parameters() if id(parameter) in in_fp8}
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        self.masters = to_data_parallel(model, self._replicas)
        workings = to_data_parallel(self.compute, self._replicas)
        self.pairs = [(master, workings[name]) for name, master in self.masters.items()]
        self.copied = [pair for name, pair in zip(self.masters, self.pairs, strict=True) if name not in quantized]
        for name, (master, working) in zip(self.masters, self.pairs, strict=True):
            # in FP8 rounded once, from float32, and not held twice
            working.data = master.data if name in quantized else working.data.to(training.dtype)
        self.step = 0
        self.optimizer = self._optimizer(matrices)
        settings = {
            "providers": dict(providers or {}),
            "device": device_row(self.device),
            "max_seq_len": training.seq_len,
            "link": expert_link(self.processes, device_row(self.device)),
        }
        self.runner = Runner(pipeline or default(), settings, meet=self.processes.compare, **(how or {}))
        self.forms = self._forms()
        named = {f"{phase}train": choice.decided for phase, choice in self.forms.items() if choice.why}
        self.runner.settings = {**settings, "decided": named}
        self.in_form = {phase: in_form(self.compute, choice.form) for phase, choice in self.forms.items()}
        self.compiled = compile
        options: dict[str, Any] = {"backend": self.runner.inductor() if compile else self.runner.backend()}
        options |= {"fullgraph": True, "dynamic": False}
        self.next_token_loss = torch.compile(with_own_code(next_token_loss), **options)
        self.mtp_loss = torch.compile(with_own_code(mtp_loss), **options)
        self._called: list[Any] = []
        self._around: Callable[[str, Callable[[], Any]], Any] = lambda name, part: part()

    def _forms(self) -> dict[str, Choice]:
        """Of the steps that train the model, and of those that train the multi-token-prediction module alone."""
        expert, parallel = self.processes.axes.expert, self.processes.parallel
        if parallel.overlap == "halves":
            asked = Choice(Form(halves=expert is not None))
            return {"": asked, "mtp_": asked}
        if expert is None or parallel.overlap != "auto" or parallel.chunks > 1:
            return {"": Choice(Form()), "mtp_": Choice(Form())}
        B, L = self.training.batch_size // self.token_processes, self.training.seq_len
        ids = torch.zeros(B, L + 2, dtype=torch.int64, device=self.device)

        def step(model: CausalLM, layers: Sequence[int], form: Form) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return next_token_loss, (model, ids, *self._places(B), form.halves)

        forms = [Form(chunks=2), Form(chunks=4), *([Form(halves=True)] if B > 1 else [])]
        with sizes_from_data():
            choice = choose(self.compute, step, forms, self.runner, tokens=B * L, ranks=expert.size)
        return {"": choice, "mtp_": Choice(Form())}

    def _places(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Positions of the tokens of so many sequences, and where each begins."""
        L = self.training.seq_len
        starts = torch.arange(0, (sequences + 1) * L, L, dtype=torch.int32, device=self.device)
        return torch.arange(L, device=self.device).repeat(sequences), starts

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        workings = dict(self.compute.named_buffers())
        for name, master in self.model.named_buffers():
            workings[name].copy_(master)

    @property
    def token_processes(self) -> int:
        """Processes that each take a part of every batch."""
        return 1 if self.tokens is None else self.tokens.size

    def _replicas(self, name: str) -> Axis | None:
        """Processes that have the same of a parameter, and tokens of their own."""
        axes = self.processes.axes
        return axes.data if axes.expert is not None and ".experts." in name else self.tokens

    def _optimizer(self, matrices: set[str]) -> torch.optim.AdamW:
        groups = [
            {
                "params": [p for n, p in self.masters.items() if n in matrices],
                "weight_decay": self.training.weight_decay,
            },
            {"params": [p for n, p in self.masters.items() if n not in matrices], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.training.lr, betas=self.training.betas, fused=True)

    def batch(self, tokens: np.ndarray, step: int) -> Tensor:
        """``[B, L + 2]`` tokens of a step, from ``tokens [N]``; the same for the same seed and step, so that a resumed run sees no repeats.

        Of several processes, each has its rows of what one would have.
        """
        t = self.training
        rng = np.random.default_rng((t.seed, step))
        starts = rng.integers(0, len(tokens) - t.seq_len - 2, size=t.batch_size)
        each = t.batch_size // self.token_processes
        first = 0 if self.tokens is None else self.tokens.rank * each
        rows = np.stack([tokens[s : s + t.seq_len + 2] for s in starts[first : first + each]]).astype(np.int64)
        return torch.from_numpy(rows).to(self.device)

    def train_step(self, tokens: np.ndarray) -> float:
        """One step on windows of ``tokens [N]``; returns the loss in nats a token."""
        t = self.training
        places = self._places(t.batch_size // self.token_processes)
        if self.step == t.steps:
            self._fix_all_but_mtp()
        self._around("copy_weights", self._copy_weights)
        loss_fn: Callable[..., Tensor] = self.next_token_loss if self.step < t.steps else self.mtp_loss
        phase = "" if self.step < t.steps else "mtp_"
        batch = self.batch(tokens, self.step)
        new = loss_fn not in self._called  # whose graphs are made in this step, on one process sooner than on another
        self._called += [loss_fn] if new else []
        compiling = self.processes.raising_together("compile") if new else contextlib.nullcontext()
        model, halves = self.in_form[phase], self.forms[phase].form.halves
        with naming(f"{phase}train"), sizes_from_data(), compiling:
            with watched(f"{phase}forward", self.step):
                loss = self._around(f"{phase}forward", lambda: loss_fn(model, batch, *places, halves))
            with watched(f"{phase}backward", self.step):
                # of the mean over all processes' tokens, as many on each
                share = None if self.tokens is None else torch.full_like(loss, 1 / self.token_processes)
                self._around(f"{phase}backward", functools.partial(loss.backward, share))
        with watched("optimizer", self.step):
            self._around("optimizer", self._update)
            mean = float(sum_over(loss.detach(), self.tokens)) / self.token_processes
        self.step += 1
        return mean

    @contextlib.contextmanager
    def wrapped(self, around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
        """Inside, ``around`` is given the name of each part of a step, and the part, which it must call.

        They are ``copy_weights``, ``forward``, ``backward`` and ``optimizer``; in the steps that train the
        multi-token-prediction module, ``mtp_forward`` and ``mtp_backward``.
        """
        before, self._around = self._around, around
        try:
            yield
        finally:
            self._around = before

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for master, working in self.copied:
            working.copy_(master)

    def _update(self) -> None:
        """Gradients, clipped, and the step of the optimizer and of the expert biases."""
        for master, working in self.pairs:
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        clip_gradients(self.masters, self.model.cuts, self.processes.axes, self.training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.lr_at(self.step)
        self.optimizer.step()
        self._balance()

    def _fix_all_but_mtp(self) -> None:
        L = self.model.config.num_hidden_layers
        for name, parameter in self.compute.named_parameters():
            parameter.requires_grad_(name.startswith(f"model.layers.{L}."))

    @torch.no_grad()
    def _balance(self) -> None:
        """Raise the bias of experts with less than the mean load, lower that of the others."""
        masters = [m for m in self.model.modules() if isinstance(m, Router)]
        if not masters:
            return
        # one message for all layers
        loads = sum_over(torch.stack([router.tokens_per_expert for router in self.routers]), self.tokens)
        for master, router, load in zip(masters, self.routers, loads, strict=True):
            # in the last steps the main model's routers see tokens too, but stay as they are
            trained = next(router.parameters()).requires_grad and load.any()
            if master.e_score_correction_bias is not None and trained:
                master.e_score_correction_bias += self.training.bias_update_speed * (load.mean() - load).sign()
                router.e_score_correction_bias.copy_(master.e_score_correction_bias)  # type: ignore[union-attr]
            router.tokens_per_expert.zero_()

    @torch.no_grad()
    def balance_loss(self) -> float | None:
        """The sequence-wise balance loss without its weight, 1 where experts are equal: a mean over layers and steps.

        Of the steps since the last call; ``None`` where none is trained with. All processes ask at the same time.
        """
        seen = [router.balance.seen for router in self.routers if router.balance is not None]
        if not seen:
            return None
        total, count = sum_over(torch.stack(seen).sum(0), self.tokens).tolist()
        for each in seen:
            each.zero_()
        return total / max(count, 1)

    @torch.no_grad()
    def drops(self) -> tuple[int, int] | None:
        """Choices of experts that went beyond their capacity, and all choices, in all layers and processes.

        Of the steps since the last call; ``None`` where nothing is dropped. All processes ask at the same time.
        """
        seen = drop_counts(self.compute)
        if not seen:
            return None
        dropped, choices = sum_over(torch.stack(seen).sum(0), self.tokens).tolist()
        for each in seen:
            each.zero_()
        return dropped, choices

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy in nats of all tokens but each window's first, over windows of ``seq_len``, no overlap.

        Of the float32 weights, computed in float32, also where training is in FP8. Processes with tokens of their own share
        the windows.
        """
        total, L = 0.0, self.training.seq_len
        was_training = self.model.training
        self.model.eval()
        starts = range(0, len(tokens) - 1, L)
        each = -(-len(starts) // self.token_processes)
        first = 0 if self.tokens is None else self.tokens.rank * each
        # exchanges of a fixed size want windows of one length: what is beyond the last token is padding
        rows = min(L, len(tokens) - 1)
        for i in range(first, first + each):
            # one beyond the last has no token, but all processes take part in each
            window = tokens[i * L : i * L + L + 1].astype(np.int64)
            n = max(len(window) - 1, 0)
            ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
            ids[:n] = torch.from_numpy(window[:n])
            q_start = torch.tensor([0, n], dtype=torch.int32, device=self.device)
            with watched("evaluate", self.step):
                logits = self.model(ids, torch.arange(rows, device=self.device), q_start)[:n]
            targets = torch.from_numpy(window[1:]).to(self.device)
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum")) if n else 0.0
        self.model.train(was_training)
        summed = sum_over(torch.tensor(total, dtype=torch.float64, device=self.device), self.tokens)
        return float(summed) / (len(tokens) - 1)

    def run(self, folder: Path, tokens: np.ndarray, heldout: np.ndarray | None = None) -> Iterator[dict[str, float]]:
        """Train to the end on ``tokens [N]``, documents one after the other; yields a row at each checkpoint.

        Where ``folder`` holds a checkpoint, training goes on from it.
        """
        t = self.training
        if len(tokens) < t.seq_len + 3:
            raise ValueError(f"trainer: want at least seq_len + 3 = {t.seq_len + 3} tokens, got {len(tokens)}")
        self.resume(folder)
        last = t.steps + t.mtp_steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        first = self.processes.axes.rank == 0
        with Progress(*columns, disable=not first) as progress:
            task = progress.add_task("train", total=last, completed=self.step)
            losses: list[float] = []
            began, begun_at = time.perf_counter(), self.step
            while self.step < last:
                losses.append(self.train_step(tokens))
                speed = (self.step - begun_at) * t.batch_size * t.seq_len / (time.perf_counter() - began)
                progress.update(task, completed=self.step, description=f"loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
                if self.step % t.checkpoint_every == 0 or self.step == last:
                    row = {"step": self.step, "loss": sum(losses) / len(losses), "tokens_per_second": speed}
                    balance = self.balance_loss()
                    if balance is not None:
                        row["balance_loss"] = balance
                    drops = self.drops()
                    if drops is not None:
                        row["dropped"], row["choices"] = drops
                    if heldout is not None:
                        row["heldout_loss"] = self.evaluate(heldout)
                    losses = []
                    self.save(folder)
                    if first:
                        with (folder / "log.jsonl").open("a") as log:
                            log.write(json.dumps(row) + "\n")
                    yield row

    def save(self, folder: Path) -> None:
        """Write weights, moments and step; a kill while writing leaves the checkpoint before it."""
        write_state(folder, self._state, self.step, self.training, self.processes)

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.masters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value
        return state

    def resume(self, folder: Path) -> None:
        """Continue from ``folder``, if there is a checkpoint."""
        found = read_state(folder, self.processes)
        if found is None:
            return
        self.step, state = found
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for name, parameter in self.masters.items():
            prefix = f"optimizer.{name}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = moments
        self._copy_buffers()
        if self.step > self.training.steps:
            self._fix_all_but_mtp()
