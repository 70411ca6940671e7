"""The wheel holds everything and works away from the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"squareq_fx": "squareq_fx", "passes": "squareq_fx/passes", "kernels": "squareq_fx/kernels"}
"""Folders of the repository, and where the wheel has them."""
FILES = ("pyproject.toml", "README.md", "LICENSE")
DATA = (
    "squareq_fx/py.typed",
    "squareq_fx/demo/config.json",
    "squareq_fx/demo/diffusion_pytorch_model.safetensors",
    "squareq_fx/demo/report.html.jinja",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside what it builds, and ships what an older build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy2(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    _run([sys.executable, "-m", "pip", "wheel", *options, str(source)], folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with the wheel in it; the dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    _run([*pip, "install", "--no-deps", "--no-index", str(wheel)], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind its own packages, and without the hooks by which an editable install would bring the repository back.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    return python.parent


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set(DATA)
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    assert expected <= names
    for room in ("passes", "kernels", "runtime", "slab", "demo"):
        assert f"squareq_fx/{room}/__init__.py" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    """No tests, benchmarks or leftovers, and nothing at the top that would shadow another package."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"squareq_fx"}
    extra = [
        name for name in names if "dist-info/" not in name and not name.endswith(".py") and name not in DATA
    ]
    assert extra == []


def test_the_metadata_names_licence_and_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.10",
        "Requires-Dist: torch<2.15,>=2.11",
    ):
        assert line in metadata.splitlines()


def test_the_command_runs_when_installed(installed: Path, tmp_path: Path) -> None:
    text = _run([str(installed / "squareq-fx"), "--help"], tmp_path)
    for command in ("build", "inspect", "verify", "demo"):
        assert command in text


def test_the_installed_package_is_whole(installed: Path, tmp_path: Path) -> None:
    """Away from the repository every room is found, in the environment and not in the repository."""
    code = (
        "import squareq_fx, squareq_fx.passes, squareq_fx.kernels, squareq_fx.runtime, squareq_fx.slab\n"
        "from squareq_fx.demo.model import load_digits_model\n"
        "print(sum(p.numel() for p in load_digits_model().parameters()), squareq_fx.kernels.__file__)"
    )
    numel, file = _run([str(installed / "python"), "-c", code], tmp_path).split(maxsplit=1)
    assert int(numel) > 0
    assert Path(file.strip()).is_relative_to(installed.parent)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
