"""The command line: ``deepfuse generate | chat | build | profile | bench | simulate | place | quantize | ops | kernels | passes | ...``.

Each command takes ``--help``. What is printed is for people; ``--json`` prints one JSON object for programs. Long, as it
has all commands: each is its arguments and a call.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

try:
    from tyro.conf import OmitArgPrefixes, Positional
    from tyro.extras import subcommand_cli_from_dict
except ModuleNotFoundError as error:
    raise SystemExit(f"deepfuse: the command line wants the package tyro, which is not here ({error})") from None

from deepfuse.profiling.bench_command import Bench
from deepfuse.profiling.profile_command import Profile
from deepfuse.profiling.simulate_command import Simulate
from deepfuse.runtime.build_options import BuildOptions
from deepfuse.runtime.place_command import Place


@dataclass(kw_only=True)
class SamplingOptions:
    """How text is chosen; what is not given comes from the checkpoint's generation_config.json."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end a text."""


def _options(sampling: SamplingOptions) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in SamplingOptions.__dataclass_fields__}


@dataclass(kw_only=True)
class Generate:
    """Continue a text, printing it as it comes."""

    model: Positional[str]
    """Checkpoint directory or preset."""
    prompt: str | None = None
    """Text to continue; read from standard input where it is not given."""
    report: bool = False
    """Print the build report afterwards."""
    json: bool = False
    options: BuildOptions = field(default_factory=BuildOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def run(self) -> None:
        prompt = sys.stdin.read() if self.prompt is None else self.prompt
        model = self.options.build(self.model)
        if self.json:
            text = model.generate(prompt, **_options(self.sampling))
            print(json.dumps({"prompt": prompt, "text": text, "report": model.report.to_json()}))
            return
        print(prompt, end="", flush=True)
        try:
            for piece in model.generate(prompt, stream=True, **_options(self.sampling)):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the text so far is on the screen
        print(flush=True)
        if self.report:
            print()
            print(model.report)


@dataclass(kw_only=True)
class Chat:
    """Talk to a model that has a chat template; an empty line or Ctrl-D ends."""

    model: Positional[str]
    options: BuildOptions = field(default_factory=BuildOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from deepfuse.runtime.source import check_chat_template

        check_chat_template(self.model)  # before a minute of compiling
        model = self.options.build(self.model)
        messages: list[dict[str, str]] = []
        while True:
            try:
                said = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not said:
                return
            messages.append({"role": "user", "content": said})
            answer = ""
            try:
                for piece in model.chat(messages, stream=True, **_options(self.sampling)):
                    answer += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass  # what was said so far is the answer
            print()
            messages.append({"role": "assistant", "content": answer})


@dataclass(kw_only=True)
class Build:
    """Build a model and print what was done."""

    model: Positional[str]
    explain: str | None = None
    """A pass whose sites are listed."""
    graph: str | None = None
    """before:PASS or after:PASS: the graph as Python."""
    graph_name: str | None = None
    """prefill, decode_1, ...; the first that has the stage where it is not given."""
    json: bool = False
    options: BuildOptions = field(default_factory=BuildOptions)

    def run(self) -> None:
        if self.explain is not None:
            self.options.check_pass(self.explain)
        if self.json and (self.explain is not None or self.graph is not None):
            raise ValueError("build: want --json, which prints the report, without --explain and --graph")
        model = self.options.build(self.model)
        if self.json:
            print(json.dumps(model.report.to_json()))
            return
        if self.explain is None and self.graph is None:
            print(model.report)
        if self.explain is not None:
            print(model.explain(self.explain))
        if self.graph is not None:
            print(model.graph(self.graph, self.graph_name))


@dataclass(kw_only=True)
class Quantize:
    """Write a checkpoint again with its linear layers in FP8, as transformers and other libraries read it."""

    source: Positional[str]
    """Checkpoint directory in full precision; it is only read."""
    target: Positional[str]
    """Directory to make."""
    json: bool = False

    def run(self) -> None:
        from deepfuse.runtime.quantize_checkpoint import quantize_checkpoint

        done = quantize_checkpoint(self.source, self.target)
        if self.json:
            print(json.dumps({"folder": self.target, **asdict(done)}))
        else:
            sizes = f"{done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB"
            print(f"{self.target}: {done.in_fp8} of {done.tensors} tensors in FP8, {sizes}")


@dataclass(kw_only=True)
class Ops:
    """List the ops, or describe one."""

    op: Positional[str | None] = None
    device: str = "cpu"
    """cpu or cuda: the kind of device the choice of provider is shown for."""
    json: bool = False

    def run(self) -> None:
        from deepfuse.runtime.describe import describe_op, ops_table

        _print(describe_op(self.op, self.device) if self.op else ops_table(self.device), self.json)


@dataclass(kw_only=True)
class Kernels:
    """Compile the Triton kernels for DeepSeek-V3's sizes, without a GPU, and show what they are made of.

    A minute or more for each processor; what is compiled already is kept by Triton.
    """

    op: str | None = None
    """Of one op only."""
    arch: str = "sm_90"
    """sm_90 (Hopper) or sm_100 (Blackwell)."""
    samples: bool = False
    """Into the file also those that only samples of ops launch: tests take the machine code of both from it."""
    json: Path | None = None
    """File to write the table to."""
    against: Path | None = None
    """A table that was written: print what differs, and fail where a kernel spills more or left the tensor cores."""

    def run(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        from deepfuse.profiling.compile_kernels import check_request, compile_kernels
        from deepfuse.profiling.kernel_changes import check_comparable, compare
        from deepfuse.profiling.kernel_table import installed_triton, read_table, table_of
        from deepfuse.runtime.out_file import check_out_file

        check_request(self.arch, self.op)
        kept = None
        if self.against is not None:  # before minutes of compiling
            kept = read_table(self.against)
            check_comparable(kept, installed_triton(), self.arch)
        if self.json is not None:
            check_out_file(self.json, "kernels: want --json")
        terminal = Console(stderr=True)
        with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
            task = bar.add_task("compiling", total=None)
            kernels = compile_kernels(
                self.arch,
                self.op,
                samples=self.samples,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        table = table_of(kernels, self.arch)
        if self.json is not None:
            table.write(self.json)
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 200)  # in a file, columns need not fit
        if kept is None:
            console.print(table)
            return
        changes = compare(kept, table, self.op)
        console.print(changes)
        if changes.worse:
            raise ValueError(f"kernels: want none worse than in {self.against}, got {len(changes.worse)}")


@dataclass(kw_only=True)
class Explain:
    """Show what a pass did at each of its sites: rewritten, or how far the match got and why it stopped."""

    name: Positional[str]
    """The pass."""
    model: Positional[str] = "v3-tiny"
    """Checkpoint directory or preset."""
    json: bool = False
    options: BuildOptions = field(default_factory=lambda: BuildOptions(compile=False))

    def run(self) -> None:
        self.options.check_pass(self.name)
        text = self.options.build(self.model).explain(self.name)
        print(json.dumps(text.splitlines()) if self.json else text)


@dataclass(kw_only=True)
class Passes:
    """List the passes in the order they run; compare graphs around one; find the one to blame."""

    action: Positional[Literal["list", "diff", "bisect"]] = "list"
    """diff NAME: graphs before and after a pass, side by side; bisect COMMAND: the first pass whose removal makes a
    failing shell command succeed (it sees DEEPFUSE_WITHOUT)."""
    argument: Positional[str | None] = None
    """Name of the pass, or the command."""
    model: str = "v3-tiny"
    """Checkpoint directory or preset, whose graphs diff shows."""
    graph_name: str | None = None
    """prefill, decode_1, ...; all graphs that the pass changed where it is not given."""
    json: bool = False
    options: BuildOptions = field(default_factory=lambda: BuildOptions(compile=False))

    def run(self) -> None:
        if self.action == "list":
            from deepfuse.runtime.describe import passes_table

            _print(passes_table(self.options.passes), self.json)
            return
        if self.argument is None:
            what = "the name of a pass" if self.action == "diff" else "a command"
            raise ValueError(f"passes {self.action}: want {what}, got nothing")
        if self.action == "diff":
            self._diff(self.argument)
        else:
            self._bisect(self.argument)

    def _diff(self, name: str) -> None:
        from deepfuse.passes.compare import side_by_side

        self.options.check_pass(name)
        journal = self.options.build(self.model).report.journal
        names = [graph.name for graph in journal.graphs]
        if self.graph_name not in (None, *names):
            raise ValueError(f"passes diff: want a graph out of {', '.join(names)}, got {self.graph_name!r}")
        pairs = {}
        for graph in journal.graphs:
            before, after = graph.snapshots.get(f"before:{name}"), graph.snapshots.get(f"after:{name}")
            if before and after and before != after and self.graph_name in (None, graph.name):
                pairs[graph.name] = {"before": before, "after": after}
        if self.json:
            print(json.dumps(pairs))
            return
        width = shutil.get_terminal_size((160, 40)).columns
        for graph_name, texts in pairs.items():
            print(f"{graph_name}: before {name} | after {name}")
            print(side_by_side(texts["before"], texts["after"], width))
        if not pairs:
            print(f"{name} changed nothing")

    def _bisect(self, command: str) -> None:
        from deepfuse.passes.bisect import bisect

        tried = []

        def check(name: str | None) -> bool:
            left_out = ",".join(filter(None, (os.environ.get("DEEPFUSE_WITHOUT"), *self.options.without, name)))
            environment = {**os.environ, "DEEPFUSE_WITHOUT": left_out}
            code = subprocess.run(command, shell=True, env=environment, check=False).returncode
            tried.append({"without": name, "exit status": code})
            if not self.json:
                print(f"{f'without {name}' if name else 'all passes'}: exit status {code}", flush=True)
            return code == 0

        found = bisect(check, self.options.passes.names)
        if self.json:
            print(json.dumps({"pass": found, "tried": tried}))
        else:
            print(f"{found}: without it the command succeeds" if found else "no single pass is to blame")


@dataclass(kw_only=True)
class Cache:
    """Show the folder of compile results, or clear it."""

    clear: bool = False
    json: bool = False

    def run(self) -> None:
        from deepfuse.runtime.compile_cache import cache_root, cache_size, clear_cache

        if self.clear:
            clear_cache()
        files, size = cache_size()
        if self.json:
            print(json.dumps({"folder": str(cache_root()), "files": files, "bytes": size}))
        else:
            print(f"{cache_root()}: {files} files, {size / 1e6:.1f} MB")


def _print(description: Any, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        print(json.dumps(description.to_json()))
    else:
        Console().print(description)


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": Generate,
    "chat": Chat,
    "build": Build,
    "profile": Profile,
    "bench": Bench,
    "simulate": Simulate,
    "place": Place,
    "quantize": Quantize,
    "ops": Ops,
    "kernels": Kernels,
    "passes": Passes,
    "explain": Explain,
    "cache": Cache,
}


def main() -> None:
    """Entry point; an error a user can mend is one line, without a traceback (``DEEPFUSE_TRACEBACK=1`` shows it)."""
    try:
        command = subcommand_cli_from_dict(COMMANDS, prog="deepfuse", description=__doc__, config=(OmitArgPrefixes,))
        command.run()
        sys.stdout.flush()  # here, where it may still fail quietly
    except KeyboardInterrupt:
        print("deepfuse: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # who reads has read enough (head, less); the interpreter would complain as it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("DEEPFUSE_TRACEBACK"):
            raise
        print(f"deepfuse: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
