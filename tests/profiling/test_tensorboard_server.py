"""``deepfuse profile open`` and ``--open``: what is refused, before a model is built."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from deepfuse.__main__ import main
from deepfuse.profiling import tensorboard_log, tensorboard_server
from deepfuse.profiling.profile import check_out


@pytest.fixture
def refused(monkeypatch, capsys):
    """What is said of a command that fails."""

    def run(*arguments):
        monkeypatch.setattr("deepfuse.runtime.build.build", None)
        monkeypatch.setattr("sys.argv", ["deepfuse", "profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("deepfuse: ")

    return run


def without(monkeypatch, package):
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda name: None if name == package else name)


def test_no_run_to_open(refused, monkeypatch, tmp_path):
    without(monkeypatch, "none")
    (tmp_path / "notes.txt").write_text("")
    assert refused("open", tmp_path) == f"profile open: want a directory with a run that profile wrote, got {tmp_path}"
    assert "got " + str(tmp_path / "no") in refused("open", tmp_path / "no")
    assert refused("open") == "profile open: want one run directory, got 0"
    assert refused("open", "a", "b") == "profile open: want one run directory, got 2"


@pytest.mark.parametrize("package", ["tensorboard", "torch_tb_profiler"])
def test_a_package_is_missing(refused, monkeypatch, tmp_path, package):
    without(monkeypatch, package)
    said = f'got no {package}: pip install "deepfuse[profiling]"'
    assert refused("open", tmp_path).endswith(said)
    assert refused("v3-tiny", "--prompt", "a", "--out", tmp_path / "run", "--open").endswith(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--shapes", "--memory", "--stacks"])
def test_what_is_written_wants_a_directory(refused, option):
    said = "profile: want --out DIR with --open, --shapes, --memory and --stacks, got none"
    assert refused("v3-tiny", "--prompt", "a", option) == said


def test_open_without_a_directory_names_the_command_for_a_run_that_is_there(refused):
    said = refused("v3-tiny", "--prompt", "a", "--open")
    assert "want --out DIR with --open" in said
    assert said.endswith("got none; deepfuse profile open DIR shows a run that was written")


def test_a_directory_in_which_nothing_can_be_written(monkeypatch, tmp_path):
    check_out(tmp_path / "a" / "b")
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
    with pytest.raises(OSError, match="want a run directory that can be made, got .*: Permission denied"):
        check_out(tmp_path / "a" / "b")
    assert asked == [tmp_path]


def test_a_link_that_leads_nowhere_is_there_already(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="not there yet"):
        check_out(tmp_path / "run")


def test_tensorboard_that_does_not_start(monkeypatch, tmp_path):
    without(monkeypatch, "none")
    (tmp_path / "run.json").write_text("{}")
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'print(\"no port is free\")'\n")
    script.chmod(0o755)
    monkeypatch.setattr(tensorboard_server.sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="profile open: want TensorBoard to start, got 'no port is free'"):
        tensorboard_server.serve(tmp_path)


def test_tensorboard_that_does_not_end_is_ended(monkeypatch, tmp_path):
    without(monkeypatch, "none")
    (tmp_path / "run.json").write_text("{}")
    script = tmp_path / "python"
    deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    says = f'print("TensorBoard {__name__} at http://localhost:1/", flush=True); time.sleep(30)'
    pid = tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec {sys.executable} -c '{deaf}; {says}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(tensorboard_server.sys, "executable", str(script))
    monkeypatch.setattr(tensorboard_server, "ENDS_S", 0.2)

    def interrupted(*args, **kwargs):
        if args:
            raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard_server, "print", interrupted, raising=False)
    began = time.monotonic()
    tensorboard_server.serve(tmp_path)
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_kill_ends_tensorboard_too(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\necho "TensorBoard 2 at http://localhost:$$/"\nexec sleep 100\n')
    server.chmod(0o755)
    code = (
        "import sys\nfrom pathlib import Path\nfrom deepfuse.profiling import tensorboard_server\n"
        "tensorboard_server.check_tensorboard = lambda: None\n"
        f"sys.executable = {str(server)!r}\n"
        f"tensorboard_server.serve(Path({str(tmp_path)!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    number = int(re.search(r":(\d+)/", process.stdout.readline())[1])
    process.terminate()
    process.communicate(timeout=60)
    try:
        assert process.returncode == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
