"""Traces in torch.profiler's format, as TensorBoard's plugin reads them."""

import gzip
import json
import logging
import pickle
import time

import pytest
import torch

from deepfuse.ir.private import cuda_memory_snapshot
from deepfuse.passes.sites import Site
from deepfuse.profiling.timeline import Part, Span, Step
from deepfuse.profiling.torch_trace import STEPS, THREAD, TorchTraces, in_older_words

NORM, LINEAR = Site(0, "layers.0.input_layernorm", "rms_norm"), Site(1, "layers.0.self_attn.q_proj", "linear")
# the plugin's last release is older than pandas 3
OLD_PANDAS = pytest.mark.filterwarnings(
    "ignore:The copy keyword is deprecated", "ignore:Downcasting object dtype arrays on .fillna:FutureWarning"
)
PARTS = [[Part("cpp_fused_0", (NORM,), ())], [Part("extern_kernels.mm", (LINEAR,), (NORM,))]]


def step():
    """A norm and a product, with clocks around them as a profile has."""
    x, out = torch.ones(64, 64), torch.empty(64, 64)
    times = [time.perf_counter_ns()]
    x = x * x.sum().rsqrt()
    times.append(time.perf_counter_ns())
    torch.mm(x, x, out=out)
    times.append(time.perf_counter_ns())
    spans = [Span(0, 0, times[0], times[1]), Span(1, 0, times[1], times[2])]
    return Step("decode_1", times[0], times[2], times[0], times[2], spans, {})


def written(folder, **options):
    traces = TorchTraces(**options)
    traces.record("decode_1", step, PARTS)
    traces.write(folder)
    return folder / "decode_1.pt.trace.json.gz"


def read(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def as_the_plugin_reads(path, caplog):
    """What it serves of a trace; what it complains of fails the test."""
    plugin = pytest.importorskip("torch_tb_profiler.profiler.data")
    from torch_tb_profiler.profiler.run_generator import RunGenerator

    with caplog.at_level(logging.WARNING):
        data = plugin.RunProfileData.parse("decode_1", None, str(path), str(path.parent))
        served = RunGenerator("decode_1", None, data).generate_run_profile()
    assert not caplog.records
    return served


def operators(served):
    return {row["name"]: row for row in served.operation_table_by_name["data"]}


def test_our_names_stand_beside_torchs(tmp_path):
    events = read(written(tmp_path))
    ours = [e for e in events if e.get("tid") == THREAD and e["ph"] == "X"]
    assert [e["name"] for e in ours if "kernel" in e["args"]] == [NORM.name, LINEAR.name] * STEPS
    assert {e["name"] for e in ours} >= {"layers.0.self_attn", "layers.0.input_layernorm"}
    assert {e["pid"] for e in ours} == {e["pid"] for e in events if e["name"] == "aten::mm"}
    # by one clock: the call of the library lies in our range of it, up to what entering a range takes
    products = [e for e in events if e["name"] == "aten::mm"]
    ranges = [e for e in ours if e["name"] == LINEAR.name]
    assert len(products) == len(ranges) == STEPS
    for product, around in zip(products, ranges, strict=True):
        entering = 500.0
        assert around["ts"] - entering <= product["ts"]
        assert product["ts"] + product["dur"] <= around["ts"] + around["dur"] + entering


@OLD_PANDAS
def test_the_plugin_lists_our_names_as_operators(tmp_path, caplog):
    served = as_the_plugin_reads(written(tmp_path), caplog)
    assert {view.display_name for view in served.views} == {"Overview", "Operator", "Trace"}
    rows = operators(served)
    assert rows[NORM.name]["calls"] == rows[LINEAR.name]["calls"] == rows["aten::mm"]["calls"] == STEPS
    # a block has its kernels' time, and none of its own
    block = rows["layers.0.self_attn"]
    assert block["host_total_duration"] == rows[LINEAR.name]["host_total_duration"]
    assert block["host_self_duration"] == 0
    assert len(served.overview["steps"]["rows"]) == STEPS


@OLD_PANDAS
def test_shapes_memory_and_stacks_are_there_where_asked_for(tmp_path, caplog):
    (tmp_path / "plain").mkdir()
    (tmp_path / "all").mkdir()
    plain = read(written(tmp_path / "plain"))
    path = written(tmp_path / "all", shapes=True, memory=True, stacks=True)
    everything = read(path)

    def seen(events):
        shapes = any(e["name"] == "aten::mm" and "Input Dims" in e.get("args", {}) for e in events)
        memory = any(e["name"] == "[memory]" for e in events)
        return shapes, memory, any(e.get("cat") == "python_function" for e in events)

    assert seen(plain) == (False, False, False) and seen(everything) == (True, True, True)
    served = as_the_plugin_reads(path, caplog)
    assert "Memory" in {view.display_name for view in served.views}
    assert "CPU" in served.get_memory_curve("ms", "KB")["metadata"]["devices"]


def on_a_gpu(runtime):
    """A trace as torch writes it of one product on a GPU, with the category of the launch."""
    common = {"ph": "X", "pid": 1, "tid": 1}
    return [
        {**common, "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 100, "args": {"External id": 1}},
        {**common, "cat": "cpu_op", "name": "aten::mm", "ts": 10, "dur": 50, "args": {"External id": 2}},
        {
            **common,
            "cat": runtime,
            "name": "cudaLaunchKernel",
            "ts": 20,
            "dur": 5,
            "args": {"External id": 2, "correlation": 7},
        },
        {
            "ph": "X",
            "cat": "kernel",
            "name": "sm90_xmma_gemm",
            "pid": 0,
            "tid": 7,
            "ts": 40,
            "dur": 30,
            "args": {"External id": 2, "correlation": 7, "device": 0, "stream": 7, "blocks per SM": 1.0},
        },
    ]


@OLD_PANDAS
@pytest.mark.parametrize("runtime", ["cuda_runtime", "cuda_driver"])
def test_the_plugin_finds_the_operator_of_a_kernel(tmp_path, caplog, runtime):
    path = tmp_path / "decode_1.pt.trace.json"
    properties = [{"id": 0, "name": "H", "numSms": 132, "maxThreadsPerMultiprocessor": 2048}]
    trace = {"schemaVersion": 1, "deviceProperties": properties, "traceEvents": in_older_words(on_a_gpu(runtime))}
    path.write_text(json.dumps(trace))
    served = as_the_plugin_reads(path, caplog)
    assert "Kernel" in {view.display_name for view in served.views}
    (row,) = served.kernel_op_table["data"]["rows"]
    assert row[0] == "sm90_xmma_gemm" and "aten::mm" in row
    assert operators(served)["aten::mm"]["device_total_duration"] == 30


def test_the_allocator_is_asked_on_a_gpu_alone(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: said.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [len(said)]})
    written(tmp_path, memory=True)
    assert said == [] and not (tmp_path / "decode_1.memory.pickle").exists()
    assert cuda_memory_snapshot(lambda: said.append("called")) == {"segments": [2]}
    assert said == [{}, "called", {"enabled": None}]
    traces = TorchTraces(memory=True)
    traces.snapshots["decode_1"] = {"segments": []}
    traces.write(tmp_path)
    assert pickle.loads((tmp_path / "decode_1.memory.pickle").read_bytes()) == {"segments": []}
