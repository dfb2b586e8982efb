"""transformers' DeepSeek models with random weights, and inputs on which rounding cannot change what they choose.

A router compares numbers, so that where two experts are nearly equal the last bit of a sum decides, and the logits
behind it are others. Prompts are drawn until no such comparison is close: what is left to differ is rounding.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

TOLERANCE = 2e-5
"""Largest difference of logits, over the largest logit: float32 sums of some hundred terms, one after the other over a
few layers, in two orders. Some 1e-6 is usual; a wrong epsilon or frequency is 1e-3 and more."""
PROMPT_LENGTHS = (9, 30)
NEW_TOKENS = 64
FULL_LENGTH = 80
"""Beyond one page of the cache."""

V3: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
}
V2 = {**V3, "norm_topk_prob": False, "n_shared_experts": 2, "topk_method": "group_limited_greedy"}


def yarn(**changes: Any) -> dict[str, Any]:
    """Of four times the context; the prompts lie within and beyond the original one."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {
        "rope_parameters": {
            **rope,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            **changes,
        }
    }


ODD_SIZES = {
    "vocab_size": 101,
    "hidden_size": 52,
    "intermediate_size": 50,
    "moe_intermediate_size": 14,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 22,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": {**V3, "num_hidden_layers": 3},
    "no-q-lora-one-group": {**V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "two-groups": {**V3, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "yarn": {**V3, **yarn()},
    "yarn-mscales-differ": {**V3, **yarn(mscale=1.0, mscale_all_dim=0.5)},
    "yarn-not-truncated": {**V3, **yarn(mscale=0.707, mscale_all_dim=0.707, beta_fast=8.0, truncate=False)},
    "weights-not-normalised": {**V3, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "one-expert-a-token": {**V3, "num_experts_per_tok": 1},
    "no-dense-layer": {**V3, "first_k_dense_replace": 0},
    "three-dense-layers": {**V3, "num_hidden_layers": 4, "first_k_dense_replace": 3},
    "three-heads": {**V3, "num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 20},
    "odd-sizes": {**V3, **ODD_SIZES},
    "tied": {**V3, "tie_word_embeddings": True},
    "two-shared-experts": {**V3, "n_shared_experts": 2},
    "half-split-rope": {**V3, "rope_interleave": False, "q_lora_rank": None},
    "attention-bias": {**V3, "attention_bias": True},
    "large-epsilon": {**V3, "rms_norm_eps": 1e-2},
    "v2-greedy": {**V2, "topk_method": "greedy", "n_group": None, "topk_group": None, "q_lora_rank": None},
    "v2-groups-yarn": {**V2, **yarn(mscale=0.707, mscale_all_dim=0.707)},
}
"""What differs from one to the next is in the name."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model of transformers and what it says.

    Attributes:
        ids: ``[2, FULL_LENGTH]``.
        logits: ``[2, FULL_LENGTH, V]`` of ``ids``.
        prompts: of ``PROMPT_LENGTHS``.
        greedy: ``NEW_TOKENS`` tokens behind each prompt.
        greedy_logits: ``[NEW_TOKENS, V]`` each, which they are the largest of.
    """

    model: Any
    ids: Tensor
    logits: Tensor
    prompts: list[list[int]]
    greedy: list[list[int]]
    greedy_logits: list[Tensor]


def oracle_model(name: str) -> Any:
    """A model with random weights of such a size that activations stay about one, the same for every process."""
    settings = CONFIGS[name]
    v2 = name.startswith("v2")
    config = DeepseekV2Config(**settings) if v2 else DeepseekV3Config(**settings)
    model = (DeepseekV2ForCausalLM if v2 else DeepseekV3ForCausalLM)(config).eval()
    model.set_experts_implementation("eager")  # the others want sizes that are multiples of 16 bytes
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith("norm.weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim == 1:  # biases, the router's among them
                tensor.copy_(0.1 * noise)
            elif key.endswith("embed_tokens.weight"):
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def oracle_case(name: str) -> Case:
    """A model and inputs that are decided clearly."""
    model = oracle_model(name)
    generator = torch.Generator().manual_seed(2)
    vocab = model.config.vocab_size
    with _margins(model) as margins:
        ids = _draw(margins, lambda: _forward(model, torch.randint(vocab, (2, FULL_LENGTH), generator=generator)))
        prompts, greedy, greedy_logits = [], [], []
        for length in PROMPT_LENGTHS:
            tokens = _draw(
                margins,
                lambda length=length: _forward(  # type: ignore[misc]
                    model, _greedy(model, torch.randint(vocab, (1, length), generator=generator))
                ),
            )
            prompts.append(tokens[0, :length].tolist())
            greedy.append(tokens[0, length:].tolist())
            greedy_logits.append(model(tokens).logits[0, length - 1 : -1])
    return Case(model, ids, model(ids).logits, prompts, greedy, greedy_logits)


def difference(logits: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest logit."""
    return float((logits - wanted).abs().max() / wanted.abs().max())


def assert_same_tokens(tokens: list[int], wanted: list[int], logits: Tensor) -> None:
    """Equal up to the first choice between two logits closer than the tolerance; what follows is another text.

    Args:
        wanted: what transformers chose.
        logits: ``[len(wanted), V]``, what it chose from.
    """
    assert len(tokens) == len(wanted)
    for i, (got, want) in enumerate(zip(tokens, wanted, strict=True)):
        if got != want:
            gap = float(logits[i, want] - logits[i, got])
            assert gap <= TOLERANCE * float(logits.abs().max()), f"token {i}: want {want}, got {got}, {gap} less likely"
            return


def _forward(model: Any, ids: Tensor) -> Tensor:
    model(ids)
    return ids


def _greedy(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)


def _draw(margins: list[float], draw: Any) -> Tensor:
    for _ in range(50):
        margins.clear()
        ids = draw()
        # choices are near one, and differ from ours by some units of roundoff
        if min(margins, default=1.0) > TOLERANCE:
            return ids
    raise AssertionError("oracle: want inputs without close choices of experts, got none in 50 draws")


@contextlib.contextmanager
def _margins(model: Any) -> Iterator[list[float]]:
    """Inside, calls of the model add how close the closest choice of each router was."""
    margins: list[float] = []

    def look(router: Any, _: Any, outputs: tuple[Tensor, ...]) -> None:
        margins.append(_margin(router, outputs[0]))

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(look) for router in routers]
    try:
        yield margins
    finally:
        for hook in hooks:
            hook.remove()


def _margin(router: Any, logits: Tensor) -> float:
    v3 = hasattr(router, "e_score_correction_bias")
    choice = logits.sigmoid() + router.e_score_correction_bias if v3 else logits.softmax(-1)
    closest = 1.0
    groups = 1 if getattr(router, "topk_method", "") == "greedy" else router.num_group
    if groups > 1:
        in_groups = choice.unflatten(-1, (groups, -1))
        scores = in_groups.topk(2).values.sum(-1) if v3 else in_groups.amax(-1)
        closest = _gap(scores, router.topk_group)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(router.topk_group).indices, True)
        choice = in_groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    return min(closest, _gap(choice, router.top_k))


def _gap(x: Tensor, k: int) -> float:
    """Smallest difference between the ``k``-th largest of a row and the next."""
    if k >= x.shape[-1]:
        return 1.0
    best = x.sort(-1, descending=True).values
    return float((best[..., k - 1] - best[..., k]).min())
