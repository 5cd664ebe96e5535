"""The wheel holds every file of the three folders, and works outside the checkout."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashnorm_compile

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "flashnorm_compile": "flashnorm_compile",
    "passes": "flashnorm_compile/passes",
    "templates": "flashnorm_compile/templates",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since a build leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", source / "dist", source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_every_file(wheel):
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import flashnorm_compile, flashnorm_compile.passes.rules, flashnorm_compile.templates, torch\n"
        "for module in (flashnorm_compile, flashnorm_compile.passes.rules, flashnorm_compile.templates):\n"
        "    print(module.__file__)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.split())


def test_entry_points_name_both_backends():
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert {"flashnorm", "flashnorm_eager"} <= {point.name for point in points}


def test_versions_agree():
    (declared,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared == flashnorm_compile.__version__
