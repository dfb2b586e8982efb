"""The page of a run: complete in itself, right in its text, and alive in a browser."""

import re
from html.parser import HTMLParser
from itertools import combinations

from browser import browser, needs_browser
from deepfuse.passes.journal import GraphEntry, PassEntry
from deepfuse.passes.sites import Site
from deepfuse.profiling.block_timeline import block_timeline
from deepfuse.profiling.page import MOST_ROWS, write_page
from deepfuse.profiling.roofline import Bounded
from deepfuse.profiling.roofline_plot import roofline_plot
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Span, Step

NORM = Site(0, "layers.0.input_layernorm", "rms_norm", "float32", "4000", "8000")
LINEAR = Site(1, "layers.0.self_attn.q_proj", "linear", "float32", "200000", "40000")
HEAD = Site(2, "lm_head", "linear<b>", "float32", "20000", "40000")
GATHER = Site(3, "model.embed_tokens", "embedding")
LIMITS = {"bytes": 1e10, "float32": 1e11}


def run(graphs=("prefill", "decode_1")):
    made = Run(model="tiny <1>", dtype="float32", device="cpu", threads=1, torch="2", date="2026-01-01", limits=LIMITS)
    for number, graph in enumerate(graphs):
        made.parts[graph] = [[Part("cpp", (s,), ()) for s in (NORM, LINEAR)], [Part("mm", (HEAD,), ())]]
        made.parts[graph].append([Part("index", (GATHER,), ())])
        times = [(0, 0, 1000, 4000), (0, 1, 4000, 94_000), (1, 0, 95_000, 135_000), (2, 0, 135_000, 136_000)]
        spans = [Span(*numbers) for numbers in times]
        made.steps.append(Step(graph, number * 10**6, number * 10**6 + 150_000, 0, 140_000, spans, {}))
    made.build = {"matches": {}, "graph_breaks": 0, "recompiles": 0, "graphs_from_cache": 0}
    return made


def entry(name="prefill", before="a = aten.mul(x, 1)\nb = aten.relu(a)", after="b = aten.relu(x)"):
    done = PassEntry("eliminate_no_ops", "semantic", "exact", 1, 0.1, {"aten.mul": -1})
    return GraphEntry(name, [done], {"before:eliminate_no_ops": before, "after:eliminate_no_ops": after})


def page(tmp_path, made=None, journal=None):
    path = tmp_path / "page.html"
    write_page(made or run(), [entry()] if journal is None else journal, path)
    return path


class Reader(HTMLParser):
    """Rows of the tables by class, and whatever would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.loaded, self.open, self.table = {}, [], [], ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag == "table":
            self.table = found["class"]
        if tag == "tr":
            self.rows.setdefault(self.table, []).append([])
        if tag in ("td", "th"):
            self.rows[self.table][-1].append("")
        if tag not in ("meta", "br", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[self.table][-1][-1] += text


def test_the_page_has_the_ops_by_time_lost_and_loads_nothing(tmp_path):
    text = page(tmp_path).read_text()
    read = Reader(text)
    assert read.loaded == [] and not re.search(r"@import|url\(|fetch\(|https?://", text)
    first = read.rows["ops"][:5]
    # bounds: 8 KB and 4 KB a microsecond at 10 GB/s, arithmetic below that but for none
    assert first[0] == ["op", "us", "bound us", "lost us", "MFLOP", "MB", "limit"]
    assert first[1] == ["linear", "90.0", "4.0", "86.0", "0.200", "0.040", "memory"]
    assert first[2] == ["linear<b>", "40.0", "4.0", "36.0", "0.020", "0.040", "memory"]
    assert [row[0] for row in first[3:]] == ["rms_norm", "embedding"] and first[4][2:] == [""] * 5
    assert ["layers.0.self_attn.q_proj.linear"] == [
        row[0] for row in read.rows["ops"] if row[0].endswith("q_proj.linear")
    ][:1]


def test_names_are_text_and_never_markup(tmp_path):
    text = page(tmp_path).read_text()
    assert "tiny &lt;1&gt;" in text and "<b>linear" not in text and "linear<b>" not in text


def test_the_page_shows_what_a_pass_changed(tmp_path):
    rows = Reader(page(tmp_path).read_text()).rows["graphs"]
    assert rows == [["before", "after"], ["a = aten.mul(x, 1)", "b = aten.relu(x)"], ["b = aten.relu(a)", ""]]
    long = entry(before="", after="\n".join(f"n{i}" for i in range(MOST_ROWS + 7)))
    text = page(tmp_path, journal=[long]).read_text()
    assert "(7 more lines: deepfuse passes diff eliminate_no_ops)" in text


def test_a_run_without_limits_has_no_roofline(tmp_path):
    made = run()
    made.limits = {}
    text = page(tmp_path, made, []).read_text()
    assert "No op of this graph has both FLOPs and bytes." in text and "No pass changed it." in text


def test_a_run_of_training_and_a_step_too_short_for_the_clock(tmp_path):
    made = run()
    made.build = {"matches": {}}
    made.steps.append(Step("decode_1", 5, 5, 5, 5, [], {}))
    made.parts["optimizer"] = [[Part("optimizer", (), ())]]
    made.steps.append(Step("optimizer", 7, 7, 7, 7, [Span(0, 0, 7, 7)], {}))
    text = page(tmp_path, made).read_text()
    assert "graph breaks" not in text and 'id="optimizer"' in text
    assert "Built with 0 graph breaks" in page(tmp_path).read_text()


def test_points_stand_where_the_axes_say():
    rows = [
        Bounded("g", "on the ridge", 10.0, 1e6, 1e5, 10.0, "memory"),
        Bounded("g", "no flops", 5.0, 0.0, 1e5, 1.0, ""),
    ]
    text = roofline_plot(rows, LIMITS, ["float32", "float8"])
    (circle,) = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', text)
    # 10 FLOP a byte at 100 GFLOP/s: where the two limits meet
    (corners,) = re.findall(r'<polyline class="roof" points="([^"]+)"', text)
    assert circle[0] == "memory" and f"{circle[1]},{circle[2]}" == corners.split()[1]
    assert "float32: 100 GFLOP/s" in text and "memory: 10 GB/s" in text and "no flops" not in text


def test_names_in_the_plot_do_not_cover_one_another():
    rows = [Bounded("g", f"operation_{i}", 10.0 + i, 1e6, 1e5 + i, 10.0, "memory") for i in range(9)]
    text = roofline_plot(rows, LIMITS, ["float32"])
    shown = [(float(x), float(y)) for x, y in re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)">', text)]
    assert 1 <= len(shown) < 9 and text.count("<circle") == 9
    # letters of 12 pixels
    width = 7 * len("operation_0")
    assert all(abs(x - u) >= width or abs(y - v) >= 12 for (x, y), (u, v) in combinations(shown, 2))


def test_blocks_lie_in_the_rows_of_their_kind():
    made = run(("prefill",))
    text = block_timeline(made.steps[0], made.parts["prefill"])
    rects = re.findall(r'<rect class="c(\d)" x="([\d.]+)" y="(\d+)" width="([\d.]+)"', text)
    # the step takes 150 us: a kernel of 90 us has three fifths of the width
    widths = {float(width) / (860 - 190 - 34) for _, _, _, width in rects}
    assert len(rects) == 4 and min(abs(width - 0.6) for width in widths) < 1e-3
    assert len({row for row, *_ in rects}) == 4 and "layer 0" in text
    assert "layers.0.self_attn: 90.0 us from 4.0 us on" in text


@needs_browser
def test_a_browser_shows_it_and_no_script_fails(tmp_path):
    path = page(tmp_path)
    with browser(tmp_path / "browser") as shown:
        for scheme, paper in (("light", "rgb(251, 251, 250)"), ("dark", "rgb(22, 24, 27)")):
            shown.open(path.as_uri(), scheme)
            shown.wait("document.body && document.body.dataset.ready")
            assert shown.value("getComputedStyle(document.body).backgroundColor") == paper
            # nothing is wider than the page
            assert shown.value("document.documentElement.scrollWidth <= innerWidth")
            assert shown.value("prefill.offsetHeight > 500 && !decode_1.offsetHeight")
            shown.value("document.querySelector('[data-graph=decode_1]').click()")
            assert shown.value("decode_1.offsetHeight > 500 && !prefill.offsetHeight")
            names = "[...decode_1.querySelector('table.ops').tBodies[0].rows].map(row => row.cells[0].textContent)"
            assert shown.value(names) == ["linear", "linear<b>", "rms_norm", "embedding"]
            for column, order in (
                (0, ["embedding", "linear", "linear<b>", "rms_norm"]),
                (1, ["linear", "linear<b>", "rms_norm", "embedding"]),
                (1, ["embedding", "rms_norm", "linear<b>", "linear"]),
            ):
                shown.value(f"decode_1.querySelectorAll('th')[{column}].click()")
                assert shown.value(names) == order
            circles = "[...decode_1.querySelectorAll('circle')].map(c => c.getBoundingClientRect().width > 4)"
            assert shown.value(circles) == [True] * 3
        assert shown.errors == []
        shown.value("setTimeout(() => missing(), 0)")
        shown.wait("new Promise(done => setTimeout(() => done(1), 100))")
        assert "missing is not defined" in shown.errors[0], "a script that fails would be seen"
