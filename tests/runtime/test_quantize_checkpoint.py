"""``deepfuse quantize``: what it writes is the op's FP8 in the release's format, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import transformers.quantizers.quantizer_finegrained_fp8
from safetensors.torch import load_file, save_file

import deepfuse as df
from deepfuse.blocks.model import CausalLM
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.quantize import quantize
from deepfuse.runtime import quantize_checkpoint as module
from deepfuse.runtime.checkpoint import CheckpointError, save_checkpoint
from deepfuse.runtime.config_json import weight_block_size
from deepfuse.runtime.quantize_checkpoint import Quantized, quantize_checkpoint
from deepfuse.runtime.shards import INDEX, SINGLE
from deepfuse.runtime.source import SHIPPED
from deepfuse.runtime.tokenizer import Tokenizer
from oracle import TOLERANCE, difference
from tiny_checkpoint import CONFIGS, TINY, assert_same_state, change, load, logits, model_of

E4M3 = torch.float8_e4m3fn
EVEN = replace(
    TINY,
    hidden_size=256,
    intermediate_size=384,
    moe_intermediate_size=128,
    kv_lora_rank=128,
    q_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=128,
    v_head_dim=32,
)
"""Whole blocks only, several to a weight: transformers 5.23 divides a weight evenly among its scales."""
WIDE = replace(TINY, hidden_size=192, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=130)
"""``kv_a_proj_with_mqa`` is [576, 192], as the release's 576 rows: blocks cut off both ways."""
IN_FP8 = (
    *(f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *(f"{part}.{name}_proj" for part in ("mlp", "mlp.shared_experts") for name in ("gate", "up", "down")),
)
"""Of a layer, beside the experts, in the release of DeepSeek-V3 (and ``q_proj`` in that of V2-Lite's form)."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of partial blocks, with files beside it."""
    path = tmp_path / "source"
    save_checkpoint(model_of(WIDE), path, files={"tokenizer.json": b"{}", "generation_config.json": b"{}"})
    return path


def is_in_fp8(name: str) -> bool:
    """By the list above, not by the rule of the library."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or parts[-1] != "weight":
        return False
    rest = parts[3:-1]
    return ".".join(rest) in IN_FP8 or (rest[:2] == ["mlp", "experts"] and len(rest) == 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_of_a_layer_and_nothing_else(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(model_of(CONFIGS[name], dtype), tmp_path / "a")
    done = quantize_checkpoint(tmp_path / "a", tmp_path / "b")
    before, after = load_file(tmp_path / "a" / SINGLE), load_file(tmp_path / "b" / SINGLE)
    linears = {tensor for tensor in before if is_in_fp8(tensor)}
    assert len(linears) > 30
    assert after.keys() == before.keys() | {f"{linear}_scale_inv" for linear in linears}
    for tensor, value in before.items():
        if tensor in linears:
            values, scale = quantize(value, E4M3, 128, 128, False)
            assert after[tensor].dtype == E4M3 and after[f"{tensor}_scale_inv"].dtype == torch.float32
            assert torch.equal(after[tensor].view(torch.uint8), values.view(torch.uint8)), tensor
            assert torch.equal(after[f"{tensor}_scale_inv"], scale), tensor
        else:
            assert after[tensor].dtype == value.dtype and torch.equal(after[tensor], value), tensor
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (before, after)]
    assert done == Quantized(len(before), len(linears), *sizes)
    assert logits(load(tmp_path / "b")).isfinite().all()


def test_the_result_is_the_dequantized_source(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "fp8")
    before, model = load(source).state_dict(), load(tmp_path / "fp8")
    after = model.state_dict()
    for name, value in before.items():
        if is_in_fp8(name):
            value = dequantize(*quantize(value, E4M3, 128, 128, False), 128, 128, torch.float32)
            assert torch.equal(after[name], value), name
        elif ".experts." not in name:  # fused here, of which the next test
            assert torch.equal(after[name], value), name
    # and again, now that it is what FP8 holds
    save_checkpoint(model, tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "again")
    assert weight_block_size(load(tmp_path / "plain").config) is None
    assert weight_block_size(load(tmp_path / "again").config) == (128, 128)
    for name, value in load(tmp_path / "again").state_dict().items():
        # the largest of a block is 448 times its scale, rounded, and that over 448 the scale or its neighbour: values
        # stay, and the product with them is rounded once more
        assert torch.allclose(value, after[name], rtol=2**-22, atol=0), name


def test_the_rest_of_the_folder(source: Path, tmp_path: Path) -> None:
    (source / "notes.md").write_text("mine")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "other.safetensors").write_bytes(b"weights of something else")
    (source / ".hidden").write_text("x")
    (source / "figures").mkdir()
    quantize_checkpoint(source, tmp_path / "deep" / "fp8")
    out = tmp_path / "deep" / "fp8"
    names = {"config.json", SINGLE, "tokenizer.json", "generation_config.json", "notes.md"}
    assert {p.name for p in out.iterdir()} == names
    assert [p.name for p in out.parent.iterdir()] == ["fp8"]
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names - {"config.json", SINGLE})
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert config == json.loads((source / "config.json").read_text())


def test_shards_fused_experts_and_other_dtypes_give_the_same_weights(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "want")
    want = load(tmp_path / "want").state_dict()
    save_checkpoint(load(source), tmp_path / "shards", max_shard_bytes=100_000)
    quantize_checkpoint(tmp_path / "shards", tmp_path / "of shards", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "of shards" / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 5 and files == {p.name for p in (tmp_path / "of shards").glob("*.safetensors")}
    held = {name: t for file in files for name, t in load_file(tmp_path / "of shards" / file).items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in held.values())
    # a weight and its scale are in one file
    place = index["weight_map"]
    assert all(place[name] == place[name.removesuffix("_scale_inv")] for name in place)
    assert_same_state(load(tmp_path / "of shards").state_dict(), want)

    fused = load(source).state_dict()
    (tmp_path / "fused").mkdir()
    save_file({name: t.contiguous() for name, t in fused.items()}, tmp_path / "fused" / SINGLE)
    (tmp_path / "fused" / "config.json").write_bytes((source / "config.json").read_bytes())
    quantize_checkpoint(tmp_path / "fused", tmp_path / "of fused")
    assert_same_state(load(tmp_path / "of fused").state_dict(), want)


# transformers

TEXT = """The Constitution gives the President of the United States the power to give to the Congress information of the \
state of the Union, and to recommend to their consideration such measures as he shall judge necessary. She was not sorry \
to be at home again, though she had enjoyed her visit, and her father was so glad to see her that he could speak of \
nothing else all the evening. The revenue of the last fiscal year was larger than that of any year before it."""


@pytest.fixture
def transformers_reads_fp8(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It asks for accelerate, with which it would spread a model over devices, and then does not use it here."""
    monkeypatch.setattr(transformers.quantizers.quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.usefixtures("transformers_reads_fp8")
@pytest.mark.parametrize("model", ["even", "shipped"])
def test_transformers_reads_it_and_says_the_same(model: str, tmp_path: Path) -> None:
    folder = SHIPPED / "v3-tiny"
    if model == "even":
        folder = tmp_path / "even"
        save_checkpoint(model_of(EVEN), folder)
    quantize_checkpoint(folder, tmp_path / "fp8")
    options = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, quantization_config=options
    )
    # it leaves what is not quantized as it lies on disk
    theirs = theirs.float().eval()
    ours = load(tmp_path / "fp8")
    state = ours.state_dict()
    compared = 0
    for name, value in theirs.state_dict().items():
        if name in state:  # tied, the head is not ours
            # a value times a scale, rounded once by both
            assert torch.equal(value, state[name]), name
            compared += 1
    assert compared > 40
    ids = (torch.arange(42) * 7 % ours.config.vocab_size).view(2, 21)
    with torch.no_grad():
        assert difference(logits(ours), theirs(ids).logits) < TOLERANCE
    # and FP8 is not what was there before
    change_of_logits = difference(logits(ours), logits(load(folder)))
    assert change_of_logits > 100 * TOLERANCE


@pytest.mark.usefixtures("transformers_reads_fp8")
def test_fp8_as_we_run_it_is_near_what_transformers_says(tmp_path: Path) -> None:
    """Relative error (norm) of the logits, of the shipped model in bfloat16; each bound is at most twice what is measured."""
    quantize_checkpoint(SHIPPED / "v3-tiny", tmp_path / "fp8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    ids = Tokenizer.from_folder(SHIPPED / "v3-tiny").encode(TEXT)
    with torch.no_grad():
        want = theirs.float().eval()(torch.tensor([ids])).logits[0]
    # weights alone: what bfloat16 rounds; activations too: a 16th of each at most, 2.6% in the root mean square
    for kind, bound in (("fp8_weights", 1.5e-2), ("fp8", 3e-2)):
        model = df.build(
            tmp_path / "fp8", quantize=kind, device="cpu", dtype="bfloat16", max_batch_size=1, compile=False
        )
        with torch.no_grad():
            error = float((model(torch.tensor([ids]))[0] - want).norm() / want.norm())
        assert bound / 2 <= error <= bound, kind


# whole or not at all


def test_refuses(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="quantize: want a folder that does not exist yet, got '.*taken'"):
        quantize_checkpoint(source, tmp_path / "taken")
    with pytest.raises(FileNotFoundError, match="want a folder, got '.*nowhere', which does not exist"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="taken: want model.safetensors or .*, got neither"):
        quantize_checkpoint(tmp_path / "taken", tmp_path / "out")
    with pytest.raises(ValueError, match="want max_shard_bytes >= 1, got 0"):
        quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=0)
    quantize_checkpoint(source, tmp_path / "fp8")
    with pytest.raises(CheckpointError, match=r"fp8: want weights in full precision, got FP8 already"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "out")
    (tmp_path / "fp8" / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"(?s)want the tensors of its config.json, got .*FP8, without quant"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "out")
    change(source, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(CheckpointError, match="1 missing:\n  lm_head.weight"):
        quantize_checkpoint(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp8", "source", "taken"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(value: float, source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    change(source, lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(CheckpointError, match=f"source: want finite weights, got {name} with NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("step", ["write_shard", "shutil.copyfileobj", "replace_file"])
def test_an_error_on_the_way_leaves_nothing(
    step: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        assert (tmp_path / ".out.tmp").is_dir() and not (tmp_path / "out").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(f"{module.__name__}.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


SLOW_COPY = """
import os, sys, time
from deepfuse.runtime import quantize_checkpoint as module
write = module.write_shard
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)
module.write_shard = slow
module.quantize_checkpoint(sys.argv[1], sys.argv[2], max_shard_bytes=60_000)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(df.__file__).parents[1])}


def test_a_killed_run_leaves_no_checkpoint_and_the_next_says_so(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_COPY, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.tmp", "source"]
    # what is there does not pass for a checkpoint either
    with pytest.raises(CheckpointError):
        load(tmp_path / ".out.tmp")
    with pytest.raises(FileExistsError, match=r"want no '.*\.out\.tmp', which a run that was killed has left"):
        quantize_checkpoint(source, tmp_path / "out")
    assert (tmp_path / ".out.tmp").is_dir()


# memory

MEASURE = """
import sys
from deepfuse.runtime.quantize_checkpoint import quantize_checkpoint

def kibibytes(name):
    # not ru_maxrss: it begins with what the parent had
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

quantize_checkpoint(sys.argv[1], sys.argv[2])  # the code that runs for the first time
before = kibibytes("VmRSS")
quantize_checkpoint(sys.argv[3], sys.argv[4])
print((kibibytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_takes_the_memory_of_one_tensor(source: Path, tmp_path: Path) -> None:
    config = replace(TINY, vocab_size=8192, hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=16)
    model = CausalLM(config)
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    save_checkpoint(model, tmp_path / "large")
    assert (tmp_path / "large" / SINGLE).stat().st_size > 600e6
    del model
    paths = [str(path) for path in (source, tmp_path / "a", tmp_path / "large", tmp_path / "b")]
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    # the largest tensor, embedding or head, is mapped and copied; an expert's is mapped, its FP8 a quarter, and what
    # one row of blocks is computed with five times 128 x 1024 float32
    largest = 8192 * 1024 * 4
    assert int(out.stdout) < largest + 5 * 128 * 1024 * 4 + 16e6
