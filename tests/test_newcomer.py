"""A first afternoon with the profiler, as somebody who reads docs/profiling.md would spend it.

The shipped model, cut to its first two layers (one dense, one of experts) as five would compile for minutes: profile it,
look at it in TensorBoard, find the slowest op by name, switch a pass off, profile again, and read what that changed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

import pytest
from safetensors.torch import load_file, save_file

from browser import BROWSER, browser
from deepfuse.__main__ import main
from deepfuse.profiling.run import Run

pytest.importorskip("torch_tb_profiler")
SHIPPED = Path(__file__).parents[1] / "models" / "v3-tiny"
PLUGIN = "data/plugin/pytorch_profiler"


def two_layers(folder):
    """The shipped model without its other layers."""
    folder.mkdir()
    config = json.loads((SHIPPED / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SHIPPED / name).read_bytes())
    later = re.compile(r"model\.layers\.([2-9]|\d\d)\.")
    tensors = {name: x for name, x in load_file(SHIPPED / "model.safetensors").items() if not later.match(name)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the model and an empty compile cache."""
    folder = tmp_path_factory.mktemp("newcomer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPFUSE_CACHE_DIR", str(folder / "cache"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache" / "inductor"))
        patch.setenv("COLUMNS", "160")
        two_layers(folder / "model")
        yield folder


@pytest.fixture
def deepfuse(monkeypatch, capsys):
    """The command line: what it prints."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["deepfuse", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


class Served:
    """TensorBoard, as ``deepfuse profile open`` starts it."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "deepfuse", "profile", "open", str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        found = re.fullmatch(r"TensorBoard: (http://localhost:\d+/) \(Ctrl-C ends it\)\n", line)
        assert found, line
        self.url = found[1]

    def get(self, path, **query):
        with urllib.request.urlopen(f"{self.url}{path}?{urlencode(query)}", timeout=60) as answer:
            return json.loads(answer.read())

    def wait(self, path, **query):
        """Until the plugin has read what is there."""
        deadline = time.monotonic() + 120
        while not (found := self.get(path, **query))["runs"] or found["loading"]:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return found["runs"]

    def end(self):
        self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


@pytest.mark.compile
def test_the_afternoon(work, deepfuse):
    arguments = ["profile", work / "model", "--prompt", "She had been", "--steps", 8]
    text = deepfuse(*arguments, "--out", work / "runs" / "a", "--memory")
    assert "us a step" in text and "lost us" in text
    run = Run.read(work / "runs" / "a")
    assert run.attributed() >= 0.95 and run.build["matches"]["decode_1"]["absorb_mla"] == 2

    slowest = next(row for row in run.rows("place") if row.graph == "decode_1" and not row.name.startswith("("))
    served = Served(work / "runs")
    try:
        assert served.wait(f"{PLUGIN}/runs") == ["a"]
        assert served.get(f"{PLUGIN}/views", run="a") == ["Overview", "Operator", "Trace", "Memory"]
        assert served.get(f"{PLUGIN}/workers", run="a", view="Operator") == ["decode_1", "prefill"]
        worker = {"run": "a", "worker": "decode_1", "span": "default"}
        operators = served.get(f"{PLUGIN}/operation/table", **worker, group_by="Operation")["data"]
        assert slowest.name in {row["name"] for row in operators}
        assert served.get(f"{PLUGIN}/overview", **worker)["steps"]["rows"]
        with urllib.request.urlopen(f"{served.url}{PLUGIN}/trace?{urlencode(worker)}") as answer:
            assert answer.status == 200
        scalars = served.get("data/plugin/scalars/tags")["a"]
        assert {f"{row.graph}, us/{row.name}" for row in run.rows("block")} <= scalars.keys()
        assert "time by op/text_summary" in served.get("data/plugin/text/tags")["a"]
        if BROWSER is not None:
            look(served.url, work, slowest.name)
    finally:
        assert served.end() == (0, "\n")

    # the pass that multiplies by the latents where they lie, left out: then they are expanded
    deepfuse(*arguments, "--out", work / "runs" / "b", "--without", "absorb_mla")
    rows = json.loads(deepfuse("profile", "diff", work / "runs" / "a", work / "runs" / "b", "--json"))
    decode = {row["name"]: row["change"] for row in rows if row["graph"] == "decode_1"}
    vanished = " ".join(name for name, change in decode.items() if change == "vanished")
    appeared = " ".join(name for name, change in decode.items() if change == "appeared")
    assert "mla_decode" in vanished and "head_matmul" in vanished and "mla_attention" in appeared
    table = deepfuse("profile", "diff", work / "runs" / "a", work / "runs" / "b")
    assert "mla_attention" in table and "appeared" in table
    assert "mla_decode" not in (work / "runs" / "b" / "page.html").read_text()


def look(url, work, slowest):
    """The run, its views, and the page, as a browser shows them."""
    with browser(work / "browser") as page:
        page.open(f"{url}data/plugin_entry.html?name=pytorch_profiler")
        text = "document.body && document.body.innerText"
        page.wait(f"({text} || '').includes('Overview') && ({text}).includes('decode_1')", 120)
        assert page.value(text).split().count("a"), "the run by its name"
        page.open(url)
        page.wait(f"({text} || '').toUpperCase().includes('PYTORCH_PROFILER')", 120)
    with browser(work / "browser2") as page:
        page.open((work / "runs" / "a" / "page.html").as_uri())
        page.wait("document.body && document.body.dataset.ready")
        names = page.value("[...decode_1.querySelectorAll('td:first-child')].map(cell => cell.textContent)")
        assert slowest in names and page.errors == []
