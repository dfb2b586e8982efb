"""Measure what a latent cache in FP8 does to the shipped model: bits per byte of held-out text, and greedy agreement.

    python -m deepfuse.recipes.evaluate_cache --data data --json benchmarks/results/fp8_cache.json

Prefill does not read the cache, so each window of text is decoded: after its first token every other one is given to a
step of its own, which reads the cache of all before it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepfuse.recipes.corpus import read_documents
from deepfuse.recipes.evaluate import PROMPTS, WINDOW
from deepfuse.runtime.build import build
from deepfuse.runtime.model import Model

NEW_TOKENS = 100
"""Of each greedy continuation."""


def decoded_logits(model: Model, windows: Tensor) -> Tensor:
    """``windows [B, T + 1] -> [B, T, vocab_size]`` float32, on the CPU: the logits behind each token but the last."""
    engine = model.engine
    places = [engine.cache.allocate(windows.shape[1]) for _ in windows]
    try:
        steps = [engine.prefill(windows[:, :1].tolist(), places, last_only=True)]
        steps += [engine.decode(column.tolist(), places) for column in windows[:, 1:-1].T]
    finally:
        for place in places:
            engine.cache.release(place)
    return torch.stack([logits.cpu() for logits in steps], 1)


def compare(models: dict[str, Model], tokens: np.ndarray, bytes_per_token: float, batch: int) -> dict[str, Any]:
    """Bits per byte of each model, and how often the first two have the same likeliest token."""
    nats, agree, count = dict.fromkeys(models, 0.0), 0, 0
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(tokens, WINDOW + 1)[::WINDOW].astype(np.int64))
    for group in windows.split(batch):
        likeliest = []
        for name, model in models.items():
            logits = decoded_logits(model, group)
            nats[name] += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten(), reduction="sum")
            )
            likeliest.append(logits.argmax(-1))
        agree += int((likeliest[0] == likeliest[1]).sum())
        count += likeliest[0].numel()
        print(
            count, {name: round(n / count / math.log(2) / bytes_per_token, 5) for name, n in nats.items()}, flush=True
        )
    return {
        "tokens": count,
        "bits_per_byte": {name: round(n / count / math.log(2) / bytes_per_token, 5) for name, n in nats.items()},
        "same_likeliest_token": round(agree / count, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="v3-tiny")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16, help="windows decoded at once")
    parser.add_argument("--windows", type=int, help="so many of the held-out text; all where it is not given")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokens, documents = np.load(args.data / "heldout.npy"), read_documents(args.data / "heldout.txt")
    bytes_per_token = sum(len(document.encode()) for document in documents) / len(tokens)
    if args.windows is not None:
        tokens = tokens[: args.windows * WINDOW + 1]
    options = {"dtype": args.dtype, "max_batch_size": args.batch, "max_seq_len": WINDOW + 1, "compile": False}
    models = {kind: build(args.model, cache_dtype=kind, **options) for kind in ("auto", "fp8")}
    results = {"model": args.model, "dtype": args.dtype, **compare(models, tokens, bytes_per_token, args.batch)}

    greedy = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "stop_token_ids": ()}
    prompts = [models["auto"].tokenizer.encode(prompt) for prompt in PROMPTS]
    plain, fp8 = (model.generate(prompts, **greedy) for model in models.values())
    same = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW_TOKENS)
        for pair in zip(plain, fp8, strict=True)
    ]
    results["greedy_tokens_before_the_first_that_differs"] = same
    results["bytes_per_token"] = {kind: model.report.cache_bytes_per_token for kind, model in models.items()}
    print(results)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
