"""The wheel: what is in it, and that it runs where no checkout is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("scenarios", "strategies", "memory", "configs")
PARTS = ("streamcl", *ROOMS, "tests", "tools", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def sources(folder: Path) -> Iterator[Path]:
    """The code and the configurations below a folder."""
    return (file for file in folder.rglob("*") if file.suffix in {".py", ".yaml"} and "__pycache__" not in file.parts)


def quietly(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command as somebody without this checkout would, and return what it prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "STREAMCL"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the wheel is made from, with a plug-in and a configuration more, each in a folder that has no __init__.py."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        if (CHECKOUT / part).is_dir():
            shutil.copytree(CHECKOUT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / part, folder)
    for added in ("strategies/new_family/new_method.py", "configs/new_family/new_method.yaml"):
        (folder / added).parent.mkdir()
        (folder / added).write_text("# empty\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    quietly(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        checkout,
        cwd=out,
    )
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it, and the packages of this one beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(quietly(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path in a .pth file is searched, and the .pth files there are not: an editable streamcl in this environment stays out.
    (site / "beside.pth").write_text(
        "\n".join(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))), encoding="utf-8"
    )
    quietly(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--ignore-installed",
        wheel,
        cwd=folder,
    )
    return python


def test_the_wheel_holds_every_plugin_and_configuration_and_nothing_else(checkout, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(checkout)) for file in sources(checkout / "streamcl")}
    expected |= {f"streamcl/{file.relative_to(checkout)}" for room in ROOMS for file in sources(checkout / room)}
    assert packed == expected | {"streamcl/py.typed", "streamcl/serving/page.html"}
    assert {"streamcl/strategies/class_incremental/icarl.py", "streamcl/configs/new_family/new_method.yaml"} <= packed


def test_the_installed_wheel_runs_the_quickstart_outside_of_the_checkout(python, tmp_path):
    package = Path(quietly(python, "-c", "import streamcl.strategies; print(streamcl.__file__)", cwd=tmp_path).strip())
    assert python.parents[1] in package.parents, "another streamcl than the wheel's was imported"
    printed = quietly(python.with_name("streamcl"), "run", "quickstart", cwd=tmp_path, OMP_NUM_THREADS="2")
    run = tmp_path / "runs" / "quickstart"
    assert json.loads((run / "scores.json").read_text(encoding="utf-8"))["final"] > 0.5
    assert (run / "report.html").stat().st_size > 10_000
    assert printed.splitlines()[-1] == f"report  {run / 'report.html'}"
