"""What importing costs, and that everything imports on a machine that has only the required packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("nvtx", "torch_tb_profiler", "tensorboard")
BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(code: str, *without: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process, in which some packages cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = BLOCKED.format(packages=without) + code
    # not of this process: the import of the package alone is what counts
    for name in ("PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHONPROFILEIMPORTTIME"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def output(code: str, *without: str) -> list[str]:
    done = run(code, *without)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_the_package_imports_nothing_heavy() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import deepfuse
heavy = ("torch._dynamo", "torch._inductor", "triton", "tyro", "transformers", "rich")
print([name for name in heavy if name in sys.modules and name not in before])
print(sorted(name for name in set(sys.modules) - before if not name.startswith("deepfuse")))
"""
    assert output(code) == ["[]", "[]"]


def test_the_import_is_fast_beside_that_of_torch() -> None:
    code = """
import time
import torch
start = time.perf_counter()
import deepfuse
print(time.perf_counter() - start)
"""
    assert float(output(code)[0]) < 0.5


def test_all_names_are_there() -> None:
    import deepfuse

    for name in deepfuse.__all__:
        assert getattr(deepfuse, name) is not None
    assert set(deepfuse.__all__) == {*deepfuse._HOMES, "passes"}
    with pytest.raises(AttributeError, match="module 'deepfuse' has no attribute 'nothing'"):
        _ = deepfuse.nothing


def test_every_module_imports_without_optional_packages() -> None:
    code = f"""
import importlib, importlib.util, pkgutil
from pathlib import Path

def fail(name):
    raise

import deepfuse
names = [m.name for m in pkgutil.walk_packages(deepfuse.__path__, "deepfuse.", fail)]
names.remove("deepfuse.__main__")
names.remove("deepfuse._entry_point")
# commands of the command line, which says by itself that it wants tyro
names = [name for name in names if not name.endswith("_command")]
for name in names:
    importlib.import_module(name)
sys.path.insert(0, {str(ROOT / "benchmarks")!r})  # where a script finds its neighbours
for file in sorted(Path(sys.path[0]).glob("*.py")):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names.append(file.stem)
print(*names, sep="\\n")
"""
    names = output(code, "tyro", *OPTIONAL)
    assert {"deepfuse.ir.op", "deepfuse.ops.rms_norm", "deepfuse.passes.lower", "deepfuse.runtime.build"} <= {*names}
    assert {"cpu", "ngram", "fp8_claims", "graph_facts"} <= {*names}
    layers = {name.split(".")[1] for name in names if name.startswith("deepfuse.")}
    assert layers == {"ir", "ops", "blocks", "passes", "runtime", "profiling", "recipes"}


def test_the_command_line_says_what_it_wants() -> None:
    done = run("import runpy; runpy.run_module('deepfuse', run_name='__main__')", "tyro")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "deepfuse: the command line wants the package tyro, which is not here (No module named 'tyro')\n"
    )
