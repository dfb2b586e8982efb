"""A checkpoint with a tokenizer, small enough to be built in seconds, and models built from it.

A build costs seconds even uncompiled, so that the tests of a process share one. They must leave it as it was.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import deepfuse as df
from deepfuse.blocks.config import Config
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import save_checkpoint
from tiny_checkpoint import TINY

BOS, EOS = 0, 1
CONFIG = replace(
    TINY,
    vocab_size=300,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    max_position_embeddings=512,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
ONE_LAYER = replace(CONFIG, num_hidden_layers=1, n_routed_experts=None)
"""The least there is to compile."""
MAX_BATCH_SIZE, MAX_SEQ_LEN = 4, 256
TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def random_weights(config: Config, seed: int = 0) -> CausalLM:
    """A model whose activations stay about one, so that it is sure of what it says."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.1 * noise)
            else:
                tensor.copy_(noise * (0.1 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5))
    return model


@functools.cache
def tokenizer_json() -> bytes:
    """Byte-level, with as many entries as the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str().encode()


def write_checkpoint(folder: Path, *, config: Config = CONFIG, files: dict[str, bytes] | None = None) -> Path:
    """With a tokenizer, and ``files`` beside it."""
    save_checkpoint(random_weights(config), folder, files={"tokenizer.json": tokenizer_json(), **(files or {})})
    return folder


@functools.cache
def checkpoint() -> Path:
    """The folder of a checkpoint, for the life of the process."""
    root = tempfile.mkdtemp(prefix="deepfuse-tests-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return write_checkpoint(Path(root) / "model")


def build(source: Any, **options: Any) -> Any:
    """``df.build`` on the CPU and uncompiled, for one sequence, where nothing else is said."""
    return df.build(source, **{"device": "cpu", "max_batch_size": 1, "max_seq_len": 64, "compile": False, **options})


@functools.cache
def tiny_model() -> Any:
    """The model of :func:`checkpoint`, uncompiled."""
    return build(checkpoint(), max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)


def eager_logits(model: Any, ids: Iterable[int]) -> Tensor:
    """``[T, V]`` of one sequence by the modules themselves, without graphs, passes and cache."""
    tokens = torch.tensor(list(ids))
    with torch.no_grad():
        return model.engine.model(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))
