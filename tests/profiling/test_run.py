"""Rows, table, JSON and trace of a run, made by hand."""

import gzip
import json

import pytest

from deepfuse.passes.sites import Site
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Span, Step, block_of
from deepfuse.profiling.trace import write_trace

NORM, LINEAR = Site(0, "layers.0.input_layernorm", "rms_norm"), Site(1, "layers.0.self_attn.q_proj", "linear")
HEAD, ROOT = Site(2, "lm_head", "linear"), Site(3, "", "index")
PARTS = [
    [Part("cpp_fused_0", (NORM,), ()), Part("cpp_fused_0", (LINEAR,), (NORM,))],
    [Part("cpp_fused_1", (LINEAR, HEAD), ())],
    [Part("extern_kernels.mm", (ROOT,), ())],
]


def step(began, scale=1):
    """Kernels of 10, 20, 40 and 5 us, 3 us apart, 7 us around them."""
    spans, now = [], began + 7000
    for kernel, part, us in ((0, 0, 10), (0, 1, 20), (1, 0, 40), (2, 0, 5)):
        spans.append(Span(kernel, part, now, now + us * 1000 * scale))
        now = spans[-1].ended + 3000
    return Step("decode_1", began, now + 7000, began + 7000, now, spans, {"u0": 2})


def run(steps=3):
    made = Run(model="m", dtype="float32", device="cpu", threads=1, torch="2", date="2026-01-01")
    made.parts["decode_1"] = PARTS
    made.steps += [step(i * 1_000_000) for i in range(steps)]
    return made


def us(rows):
    return {row.name: row.us for row in rows}


def test_rows_by_op():
    rows = run().rows()
    assert us(rows) == {"linear": 60.0, "(guards)": 14.0, "(wrapper)": 12.0, "rms_norm": 10.0, "index": 5.0}
    assert [row.us for row in rows] == sorted((row.us for row in rows), reverse=True)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.name: row.calls for row in rows}["linear"] == 2


def test_a_kernel_that_spans_blocks_says_so():
    assert us(run().rows("block")) == {
        "layers.0.self_attn + lm_head": 40.0,
        "layers.0.self_attn": 20.0,
        "(guards)": 14.0,
        "(wrapper)": 12.0,
        "layers.0.input_layernorm": 10.0,
        "index": 5.0,
    }
    assert "layers.0.self_attn.q_proj.linear + lm_head.linear" in us(run().rows("place"))


def test_one_slow_step_changes_nothing():
    slow = run()
    slow.steps[1] = step(1_000_000, scale=100)
    assert us(slow.rows()) == us(run().rows())


def test_what_has_no_module_is_not_attributed():
    assert run().attributed() == pytest.approx(70 / 75)


def test_rows_by_something_else():
    with pytest.raises(ValueError, match="want rows by 'op', 'block' or 'place', got 'layer'"):
        run().rows("layer")


def test_the_table_sums_what_it_leaves_out():
    made = run()
    assert "linear" in str(made) and "decode_1" in str(made)
    table = made.table(most=2)
    names, times = list(table.columns[1].cells), list(table.columns[3].cells)
    assert names == ["linear", "(guards)", "(3 more)"] and times == ["60.0", "14.0", "27.0"]


def test_written_and_read_back(tmp_path):
    made = run()
    made.write(tmp_path / "run.json")
    read = Run.read(tmp_path)
    assert read == made and read.rows("place") == made.rows("place")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["attributed"] == made.attributed() and data["rows"]["op"][0]["name"] == "linear"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"parts": {}, "steps": 3}'])
def test_a_directory_that_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run: want a directory that profile wrote, got"):
        Run.read(tmp_path)


def test_what_is_wrong_with_a_directory_is_said_in_words(tmp_path):
    with pytest.raises(ValueError, match="got .*: No such file or directory$"):
        Run.read(tmp_path / "nowhere")
    run().write(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    data["steps"][0]["graph"] = "another"
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="a step of a graph without parts"):
        Run.read(tmp_path)
    run().write(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    data["steps"][0]["spans"][0]["part"] = 99
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="a span of a part that its graph lacks"):
        Run.read(tmp_path)


def test_a_trace_without_steps(tmp_path):
    run(steps=0).write(tmp_path / "run.json")
    with pytest.raises(ValueError, match="run: want a trace with steps, got none in"):
        Run.read(tmp_path)


def test_the_trace_has_our_names_in_time(tmp_path):
    write_trace(run(steps=2), tmp_path / "trace.json.gz")
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    rows = {tid: [e for e in events if e["tid"] == tid] for tid in (1, 2, 3)}
    assert [e["name"] for e in rows[1]] == ["decode_1"] * 2 and rows[1][1]["ts"] == 1000.0
    kernels = rows[3][:4]
    assert [e["name"] for e in kernels[:2]] == ["layers.0.input_layernorm.rms_norm", "layers.0.self_attn.q_proj.linear"]
    assert [e["dur"] for e in kernels] == [10.0, 20.0, 40.0, 5.0]
    assert kernels[1]["args"] == {
        "kernel": "cpp_fused_0",
        "blocks": ["layers.0.self_attn"],
        "with": ["layers.0.input_layernorm.rms_norm"],
    }
    assert rows[2][0]["name"] == "layers.0.input_layernorm" and len(rows[2]) == 8
    # a viewer nests by time: nothing crosses the step it is in
    for event in rows[2] + rows[3]:
        inside = [s for s in rows[1] if s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"]]
        assert len(inside) == 1


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("layers.3.self_attn.q_a_proj", "layers.3.self_attn"),
        ("layers.3", "layers.3"),
        ("lm_head", "lm_head"),
        ("norm.add", "norm.add"),
    ],
)
def test_blocks(module, block):
    assert block_of(module) == block
