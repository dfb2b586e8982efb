"""What is installed is what lies in the root folders; the tables of pyproject.toml and the locks are complete."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import deepfuse

ROOT = Path(__file__).parents[1]
FACADE = ROOT / "src" / "deepfuse"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS = {
    layer
    for row in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    for layer in row.replace("|", " ").split()
}


def _build(kind: str, source: Path, target: Path) -> Path:
    """Build without isolation, so that no network is needed."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


def _packed(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    return {name for name in names if ".dist-info/" not in name}


def _on_disk() -> set[str]:
    """Every file that belongs into the wheel, by its path there."""
    folders = [ROOT / layer for layer in LAYERS] + [ROOT / "models" / "v3-tiny"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    packed = {f"deepfuse/{path.relative_to(ROOT).as_posix()}" for path in files if "__pycache__" not in path.parts}
    return packed | {f"deepfuse/{name}" for name in ("__init__.py", "__main__.py", "_entry_point.py", "py.typed")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_wheel_has_every_file(wheel: Path) -> None:
    assert _packed(wheel) == _on_disk()


def test_wheel_has_the_command_and_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        assert "deepfuse = deepfuse.__main__:main" in archive.read(info["entry_points.txt"]).decode()
        assert archive.read(info["LICENSE"]) == (ROOT / "LICENSE").read_bytes()


def test_wheel_from_source_archive_has_every_file(tmp_path: Path) -> None:
    # hatchling drops files it reaches twice, by their folder and by a link: the archive must still be whole
    archive = _build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert _packed(_build("wheel", source, tmp_path / "wheel")) == _on_disk()


def test_links_match_the_layers() -> None:
    links = {path.name: os.readlink(path) for path in FACADE.iterdir() if path.is_symlink()}
    assert links == {name: f"../../{name}" for name in LAYERS | {"models"}}


def test_tables_name_every_layer() -> None:
    tool = PROJECT["tool"]
    assert set(tool["hatch"]["build"]["targets"]["wheel"]["force-include"]) == LAYERS | {"models/v3-tiny"}
    assert set(tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == LAYERS
    assert set(tool["pyright"]["include"]) == LAYERS | {"tests"}


def test_version_is_the_packages() -> None:
    assert deepfuse.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize("lock", sorted(path.name for path in (ROOT / "requirements").glob("*.txt")))
def test_lock_pins_by_hash_and_names_no_address(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text()
    for address in ("://", "file:", " @ ", "--index", "--extra-index", "--find-links"):
        assert address not in text
    requirements = re.sub(r"\\\n\s*", "", text).splitlines()
    assert requirements
    for requirement in requirements:
        # no local version such as 2.15.0+cpu, which no public registry has
        assert re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.]+ (; .*)?(--hash=sha256:[0-9a-f]{64}\s*)+", requirement)
