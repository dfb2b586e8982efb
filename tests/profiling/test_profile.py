"""A profiled generation: every kernel has module and op, from a kept build too, and nothing of it stays behind."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

import deepfuse as df
from deepfuse.__main__ import main
from deepfuse.profiling.nvtx import COLORS
from deepfuse.profiling.roofline import roofline
from deepfuse.profiling.run import Run
from nvtx_log import heard_from
from tiny_model import CONFIG, ONE_LAYER, build, write_checkpoint

PROMPT = [5, 6, 7]
ONE_OF_EXPERTS = replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)


def generate(model, tokens=6):
    return model.generate(PROMPT, max_new_tokens=tokens, stop_token_ids=())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The same model from an empty cache, and from what the first build left there."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPFUSE_CACHE_DIR", str(root))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root / "inductor"))
        folder = write_checkpoint(root / "model", config=ONE_OF_EXPERTS)
        cold, warm = (build(folder, compile=True) for _ in range(2))
        assert not cold.report.warm and warm.report.warm
        yield cold, warm


@pytest.fixture
def model(compiled):
    return compiled[0]


@pytest.mark.compile
def test_kernels_of_prefill_and_decode_have_module_and_op(compiled, tmp_path):
    runs = []
    for name, model in zip(("cold", "warm"), compiled, strict=True):
        expected = generate(model)
        with df.profile(model, tmp_path / name) as run:
            assert generate(model) == expected
        runs.append(run)
        assert run.graphs == ["prefill", "decode_1"] and len(run.steps_of("decode_1")) == 5
        assert run.attributed() >= 0.95
        for step in run.steps:
            assert step.spans and step.began <= step.code_began <= step.code_ended <= step.ended
            ends = [step.code_began, *(t for s in step.spans for t in (s.began, s.ended)), step.code_ended]
            assert ends == sorted(ends), "spans lie in the code, one after the other"
            assert step.wrapper_ns > 0 and step.guard_ns > 0
        places = {row.name for row in run.rows("place") if row.graph == "decode_1"}
        assert {
            "layers.0.self_attn.mla_decode",
            "layers.0.mlp.gate.route",
            "lm_head.linear",
            "(wrapper)",
            "(guards)",
        } <= places
        assert Run.read(tmp_path / name) == run
        # a prompt of 3 tokens: free sizes in the code are those of the costs
        bounds = {row.name: row for row in roofline(run, "place") if row.graph == "prefill"}
        norm = bounds["layers.0.input_layernorm.rms_norm"]
        cost = df.OPS["rms_norm"].cost(torch.empty(3, 32), torch.empty(32), 1e-6)
        assert (norm.flops, norm.bytes) == (cost.flops, cost.bytes)
        events = json.loads(gzip.decompress((tmp_path / name / "trace.json.gz").read_bytes()))["traceEvents"]
        assert {"lm_head.linear", "layers.0.mlp", "prefill"} <= {event["name"] for event in events}
    # names survive in what is kept
    assert runs[0].parts == runs[1].parts
    # the cache's free size, in pages
    assert {tuple(step.sizes.values()) for step in runs[0].steps_of("decode_1")} == {(1,)}


@pytest.mark.compile
def test_steps_are_limited_and_nothing_stays_behind(model):
    unwrapped = model.engine._prefills
    with df.profile(model, steps=2) as run:
        before = generate(model)
    assert len(run.steps_of("decode_1")) == 2 and len(run.steps_of("prefill")) == 1
    assert model.engine._prefills is unwrapped
    recorded = len(run.steps)
    assert generate(model) == before and len(run.steps) == recorded
    # again, with the code that is there
    with df.profile(model) as again:
        assert generate(model) == before
    assert again.parts == run.parts


@pytest.mark.compile
def test_a_block_that_fails_leaves_the_model_as_it_was(model, tmp_path):
    expected = generate(model)
    with pytest.raises(RuntimeError, match="mine"), df.profile(model, tmp_path / "run"):
        generate(model)
        raise RuntimeError("mine")
    assert generate(model) == expected and not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError, match="mine"), df.profile(model, tmp_path / "run"):
        (tmp_path / "run" / "notes").write_text("of the caller")
        raise RuntimeError("mine")
    assert (tmp_path / "run" / "notes").read_text() == "of the caller"


@pytest.mark.compile
@pytest.mark.parametrize(
    ("out", "options", "error", "message"),
    [
        ("run", {}, ValueError, "want a step of the model inside the block, got none"),
        ("", {}, FileExistsError, "want a run directory that is not there yet, got "),
        ("file/run", {}, OSError, "want a run directory that can be made, got .*: Not a directory"),
        ("run", {"warmup": 0}, ValueError, "want warmup as an integer >= 1, got 0"),
        ("run", {"warmup": True}, ValueError, "want warmup as an integer >= 1, got True"),
        ("run", {"steps": True}, ValueError, "want steps as an integer >= 1 or None, got True"),
        ("run", {"steps": 0}, ValueError, "want steps as an integer >= 1 or None, got 0"),
    ],
)
def test_what_cannot_be_profiled(model, tmp_path, out, options, error, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=f"profile: {message}"), df.profile(model, tmp_path / out, **options):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.compile
def test_one_profile_at_a_time(model):
    expected = generate(model)
    with pytest.raises(ValueError, match="want one profile at a time"), df.profile(model):
        generate(model)
        with df.profile(model):
            generate(model)
    assert generate(model) == expected


RANGED = """
import sys
from pathlib import Path
import torch
import deepfuse as df
from tiny_model import build

def libraries():
    return sorted(Path({root!r}).rglob("*.so"))

def generate():
    return model.generate([5, 6, 7], max_new_tokens=3, stop_token_ids=())

torch.set_num_threads({threads})
model = build({model!r}, compile=True)
expected, compiled = generate(), libraries()
with df.profile(model, nvtx=True):
    assert generate() == expected
assert generate() == expected
assert model.report.warm and not model.report.recompiles and libraries() == compiled
with df.profile(model, {out!r}, nvtx=True, warmup=1) as run:
    assert generate() == expected
assert run.attributed() >= 0.95 and len(run.steps) == 3
"""


@pytest.mark.compile
def test_ranges_of_a_kept_build(compiled, tmp_path):
    """From a warm cache, without compiling anything; alone, and in a recorded run."""
    pytest.importorskip("nvtx", reason="of the extra nvtx")
    folder = compiled[0].source
    program = RANGED.format(
        root=str(folder.parent), threads=torch.get_num_threads(), model=str(folder), out=str(tmp_path / "run")
    )
    heard = heard_from(program, tmp_path)
    assert {(h.domain, h.depth, h.category) for h in heard} == {
        ("deepfuse", 0, "graph"),
        ("deepfuse", 1, "block"),
        ("deepfuse", 2, "op"),
    }
    graphs = [i for i, h in enumerate(heard) if h.category == "graph"]
    names = [heard[i].name for i in graphs]
    # behind the first block nothing; in the second, calls that find the code, warm it up and are traced come first
    assert names[:4] == ["prefill", "decode_1", "decode_1", "prefill"] and {*names[4:]} == {"prefill", "decode_1"}
    prefill, decode = heard[: graphs[1]], heard[graphs[1] : graphs[2]]
    assert prefill == heard[graphs[3] : graphs[4]]
    # a library's product has a kernel of its own, within its block's range
    at = next(i for i, h in enumerate(prefill) if h.name == "layers.0.self_attn.q_a_proj.linear")
    block = next(h for h in reversed(prefill[:at]) if h.category == "block")
    assert block.name == "layers.0.self_attn" and {block.color, prefill[at].color} == {f"{COLORS['attention']:08x}"}
    # a step in one C++ kernel: one range, which names its first ops and counts the others
    assert [(h.category, h.color) for h in decode[1:]] == [(c, f"{COLORS['several']:08x}") for c in ("block", "op")]
    assert "layers.0.self_attn + " in decode[1].name and "lm_head" in decode[1].name and " more with " in decode[2].name


@pytest.mark.compile
def test_the_command(model, monkeypatch, tmp_path, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["deepfuse", "profile", "tiny", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        main()
        return capsys.readouterr().out

    monkeypatch.setattr("deepfuse.runtime.build.build", lambda *_, **__: model)
    table = run("--prompt", "the fox", "--steps", 3, "--out", tmp_path / "run", "--by", "block")
    assert "layers.0.self_attn" in table and "(wrapper)" in table and "lost us" in table
    assert len(Run.read(tmp_path / "run").steps_of("decode_1")) == 3
    data = json.loads(run("--prompt", "the fox", "--steps", 1, "--json"))
    assert data["attributed"] >= 0.95 and data["rows"]["op"]
    assert {row["limit"] for row in data["roofline"]} >= {"memory"} and data["roofline"][0]["lost_us"] is not None

    def refused(*arguments):
        # before anything is built
        monkeypatch.setattr("deepfuse.runtime.build.build", None)
        with pytest.raises(SystemExit):
            run(*arguments)
        return capsys.readouterr().err

    assert "want a run directory that is not there yet" in refused("--prompt", "a", "--out", tmp_path / "run")
    assert "want --steps >= 1, got 0" in refused("--prompt", "a", "--steps", 0)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: build(ONE_LAYER), ValueError, "want a compiled model, got one built with compile=False"),
        (dict, TypeError, "want what deepfuse.build returns, got dict"),
    ],
)
def test_models_without_inductors_code(model, error, message):
    with pytest.raises(error, match=message), df.profile(model()):
        pass
