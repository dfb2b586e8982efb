"""The suites of a checkout: found, listed with their questions, and run.

They lie in ``benchmarks/`` and are no part of the wheel: they have peers, data and results that a wheel has no use for.
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_against import comparison
from deepfuse.profiling.bench_device import facts, versions
from deepfuse.profiling.bench_results import Results, check_comparable, words
from deepfuse.runtime.out_file import check_out_file

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ARGUMENTS = {
    "json": (Path, "file to write the rows to, each as it is measured"),
    "against": (Path, "results of the same suite and device, that the rows are compared with"),
    "budget": (float, "seconds: what does not fit is left out, and listed"),
    "only": (str, "run the parts whose name contains this text; rows of others stay in the file as they are"),
}


@dataclass(frozen=True, slots=True)
class Suite:
    """A file of ``benchmarks/`` with a function ``suite``."""

    name: str
    path: Path
    question: str


def suites(folder: Path = FOLDER) -> dict[str, Suite]:
    """By name; a file is read, not run.

    Raises:
        ValueError: there is no such folder, as in a wheel.
    """
    if not folder.is_dir():
        raise ValueError(f"bench: want a checkout of deepfuse, which has {folder.name}/, got {folder.parent}")
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "suite" for node in tree.body):
            paragraph = (ast.get_docstring(tree) or "").partition("\n\n")[0]
            found[path.stem] = Suite(path.stem, path, " ".join(paragraph.split()))
    return found


def run_suite(
    name: str,
    *,
    json: Path | None = None,
    against: Path | None = None,
    budget: float | None = None,
    only: str | None = None,
    folder: Path = FOLDER,
    console: Console | None = None,
) -> Results:
    """Run a suite: print each row, write it, and compare with a baseline.

    Args:
        only: part of the names of what is run; rows that ``json`` has of other parts stay.

    Raises:
        ValueError: no such suite, a GPU suite without a GPU, a budget that is none, ``json`` that cannot be
            written, a baseline of another suite or device, or ``only`` names no part.
    """
    console = console or Console()
    known = suites(folder)
    if name not in known:
        raise ValueError(f"bench: want a suite out of {', '.join(known)}, got {name!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"bench: want --budget > 0, got {budget}")
    if json is not None:
        check_out_file(json, "bench: want --json")
    module = _load(known[name].path)
    device = _device(name, getattr(module, "DEVICE", "cpu"))
    results = Results(suite=name, command=f"deepfuse bench {name}", device=facts(device), versions=versions())
    # before minutes of measuring, and before it is overwritten
    baseline = None
    if against is not None:
        baseline = Results.read(against)
        check_comparable(results.device, against, baseline, name)
    if only is not None and json is not None and json.exists():
        results = _continued(results, json)
    console.print(
        f"{name}: {known[name].question}\n{words(results.device)}; {words(results.versions)}",
        highlight=False,
        soft_wrap=True,
    )

    limit = getattr(module, "BUDGET", None) if budget is None else budget
    bench = Bench(results, path=json, budget=limit, only=only, console=console)
    suite: Callable[[Bench], None] = module.suite
    suite(bench)
    if only is not None and not any(only in part for part in bench.parts):
        raise ValueError(f"bench: want --only out of {'; '.join(bench.parts)}, got {only!r}")
    bench.finish()
    if baseline is not None:
        console.print(comparison(baseline, bench.results, bench.measured))
    return bench.results


def run_script(file: str) -> None:
    """Run the suite that a script is, with the arguments of ``deepfuse bench`` but without the command line's packages."""
    path = Path(file).resolve()
    question = suites(path.parent)[path.stem].question
    parser = argparse.ArgumentParser(description=question)
    for name, (kind, what) in ARGUMENTS.items():
        parser.add_argument(f"--{name}", type=kind, help=what)
    try:
        run_suite(path.stem, **vars(parser.parse_args()), folder=path.parent)
    except (ValueError, OSError) as error:
        raise SystemExit(f"deepfuse: {error}") from None


def _load(path: Path) -> ModuleType:
    """The module of a suite, which finds its neighbours as a script does."""
    name = f"{path.stem}_suite"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up there
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _device(name: str, wanted: str) -> torch.device:
    assert wanted in ("cpu", "cuda", "auto"), wanted
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ValueError(f"bench: want a CUDA device for the suite {name}, got none (torch {torch.__version__})")
    return torch.device("cuda" if wanted != "cpu" and there else "cpu")


def _continued(results: Results, path: Path) -> Results:
    """New rows are put among those of a file, where one table may have both."""
    kept = Results.read(path)
    check_comparable(results.device, path, kept, results.suite)
    for package, version in kept.versions.items():
        if results.versions.get(package) != version:
            got = results.versions.get(package, "none")
            raise ValueError(f"bench: want {package} {version}, as the other rows of {path}, got {got}")
    return replace(results, rows=kept.rows, left_out=kept.left_out, finished=kept.finished)
