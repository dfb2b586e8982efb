"""Measure the shipped model: bits per byte of held-out text, and ten samples with the share of known words.

    python -m deepfuse.recipes.evaluate --model models/v3-tiny --data data --json benchmarks/results/evaluate.json

The samples continue fixed prompts with fixed seeds; a word is known when it stands in the training text.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfuse.recipes.corpus import read_documents
from deepfuse.runtime.build import build
from deepfuse.runtime.model import Model

PROMPTS = (
    "It is a truth universally acknowledged, that",
    "The condition of our foreign affairs",
    "Emma was not at all sorry",
    "Fellow citizens of the Senate and House of Representatives,",
    "She had been so long in the country that",
    "Our relations with foreign powers",
    "Anne was not sorry to be",
    "The revenue for the last fiscal year",
    '"I hope," said Elinor,',
    "The people of this country have",
)
WINDOW = 512
"""Tokens a window of held-out text has: the length the model was trained on. Windows do not overlap."""
WORD = re.compile(r"[A-Za-z']+")


def bits_per_byte(model: Model, tokens: np.ndarray, text_bytes: int) -> float:
    """Of all tokens but the first, each predicted from those before it in its window (and the last one before it)."""
    nats, batch = 0.0, model.engine.max_batch_size
    windows = [tokens[i : i + WINDOW + 1].astype(int).tolist() for i in range(0, len(tokens) - 1, WINDOW)]
    for i in range(0, len(windows), batch):
        group = windows[i : i + batch]
        logits = model.engine.prefill([w[:-1] for w in group], [None] * len(group), last_only=False)
        following = torch.tensor([t for w in group for t in w[1:]], device=logits.device)
        nats += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
    return nats / math.log(2) / text_bytes


def samples(model: Model) -> list[str]:
    """Ten texts, prompt included."""
    return [
        prompt + model.generate(prompt, max_new_tokens=100, temperature=0.7, top_p=0.85, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]


def known_words(texts: Iterable[str], training_text: str) -> float:
    """Share of the words of ``texts`` that stand in the training text, in any capitals; a cut last word is left out."""
    vocabulary = {w.lower().strip("'") for w in WORD.findall(training_text)}
    words = [w.lower().strip("'") for text in texts for w in WORD.findall(text)[:-1]]
    words = [w for w in words if w]
    return sum(w in vocabulary for w in words) / max(len(words), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/v3-tiny")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    heldout, documents = np.load(args.data / "heldout.npy"), read_documents(args.data / "heldout.txt")
    text_bytes = sum(len(document.encode()) for document in documents)
    results: dict[str, Any] = {"heldout_bytes": text_bytes, "bits_per_byte": {}}
    for dtype in args.dtypes:
        model = build(args.model, dtype=dtype, max_batch_size=1)
        results["bits_per_byte"][dtype] = round(bits_per_byte(model, heldout, text_bytes), 4)
    texts = samples(model)
    results["known_words"] = round(known_words(texts, (args.data / "train.txt").read_text()), 4)
    results["samples"] = texts
    print("\n\n".join(texts))
    print({k: v for k, v in results.items() if k != "samples"})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
