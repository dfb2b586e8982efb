"""Scalars and text for TensorBoard, read back by TensorBoard itself."""

import pytest

from deepfuse.ir.private import COLLECTIVES
from deepfuse.passes.sites import Site
from deepfuse.profiling import tensorboard_log
from deepfuse.profiling.run import Run
from deepfuse.profiling.tensorboard_log import check_installed, scalars, texts, write_log
from deepfuse.profiling.timeline import Part, Span, Step

NORM = Site(0, "layers.0.norm", "rms_norm", "float32", "2*u0", "8*u0")
Q = Site(1, "layers.0.self_attn.q_proj", "linear", "float32", "100*u0", "40*u0 + 10")
O = Site(2, "layers.0.self_attn.o_proj", "linear", "float32", "100*u0", "40*u0")
INDEX = Site(3, "", "index")


def run():
    made = Run(model="m", dtype="float32", device="cpu", threads=1, torch="2", date="2026-01-01")
    made.limits = {"bytes": 1e9, "float32": 1e10}
    made.parts["decode_1"] = [[Part("cpp_0", (NORM,), ()), Part("cpp_0", (Q,), ())], [Part("mm", (O,), (Q,))]]
    for number, u0 in enumerate((1, 2)):
        spans = [Span(0, 0, 0, 1000), Span(0, 1, 1000, 3000 + number * 1000), Span(1, 0, 5000, 9000)]
        made.steps.append(Step("decode_1", 0, 10_000, 0, 10_000, spans, {"u0": u0}))
    made.build = {"matches": {"decode_1": {"absorb_mla": 5, "lower": 40}}, "recompiles": 0, "graphs_from_cache": 2}
    return made


def test_time_and_bytes_by_block_of_each_step():
    found = {(tag, step): value for tag, value, step in scalars(run())}
    assert [found["decode_1, us/layers.0.self_attn", n] for n in (0, 1)] == [6.0, 7.0]
    # those of the norm and of both products, each once, in the step's size
    assert [found["decode_1, bytes/layers.0.self_attn", n] for n in (0, 1)] == [90.0, 170.0]
    assert [found["decode_1, bytes/layers.0.norm", n] for n in (0, 1)] == [8.0, 16.0]
    assert found["decode_1/ms", 1] == 0.01
    assert found["decode_1, matches/absorb_mla", 0] == 5
    assert (found["build/recompiles", 0], found["build/graphs_from_cache", 0]) == (0, 2)


def test_an_op_without_a_cost_has_time_and_no_bytes():
    made = run()
    made.parts["decode_1"][1] = [Part("index", (INDEX,), ())]
    tags = {tag for tag, _, _ in scalars(made)}
    assert "decode_1, us/index" in tags and not any(tag.startswith("decode_1, bytes/index") for tag in tags)


def test_exposed_communication_where_there_is_any():
    made = run()
    assert not any("communication" in tag for tag, *_ in scalars(made))
    made.parts["decode_1"][1] = [Part(f"torch.ops.{COLLECTIVES}.wait_tensor.default", (O,), ())]
    # the wait of 4 us in a step of 10
    found = {step: value for tag, value, step in scalars(made) if tag == "decode_1/exposed communication, %"}
    assert found == {0: 40.0, 1: 40.0}


def test_text_has_the_slowest_and_what_was_rewritten():
    found = texts(run())
    assert found["time by op"].splitlines()[2].startswith("| decode_1 | linear | 6.5 |")
    assert "| absorb_mla | 5 |" in found["rewrites by pass"]
    assert "layers.0.self_attn.o_proj.linear" in found["time lost against the device's limits"]
    made = run()
    made.limits, made.build = {}, {}
    assert list(texts(made)) == ["time by op"]


def test_tensorboard_reads_it(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_log(run(), tmp_path)
    read = accumulators.EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == {tag for tag, _, _ in scalars(run())}
    assert [e.value for e in read.Scalars("decode_1, bytes/layers.0.self_attn")] == [90.0, 170.0]
    (event,) = read.Tensors("time by op/text_summary")
    assert b"linear" in event.tensor_proto.string_val[0]


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda name: None if name == "torch_tb_profiler" else name)
    check_installed("tensorboard")
    with pytest.raises(RuntimeError) as caught:
        check_installed("tensorboard", "torch_tb_profiler")
    assert str(caught.value) == (
        "profile: want the packages tensorboard and torch_tb_profiler, got no torch_tb_profiler: "
        'pip install "deepfuse[profiling]"'
    )
