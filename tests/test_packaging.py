"""The wheel: what it carries, and that it works far from the checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built with the build backend that is installed: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip unpacks it, away from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``wph-tune *args`` from the unpacked wheel only; -P keeps the working directory out of the import path."""
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'wph-tune'; from tuner.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *args], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_wheel_has_every_tracked_file_of_the_package_and_all_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "tuner", "templates"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the package")
    for name in listed.stdout.split("\n"):
        inside = f"tuner/{name}" if name.startswith("templates/") else name
        assert not name or not (ROOT / name).exists() or inside in names, f"{name} is not in the wheel"
    assert any(name.endswith(".h") for name in names) and any(name.endswith(".schema.json") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "build/", "templates/"))]


def test_wheel_says_licence_python_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(info).decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "wph-tune = tuner.cli:main" in points


def test_installed_command_helps_from_any_directory(site: Path, tmp_path: Path) -> None:
    done = run(site, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Usage: wph-tune")


def test_installed_package_renders_from_its_own_templates(site: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from tuner.render import render, template_folder\n"
        "from tuner.space import Problem, default_config\n"
        "print(template_folder())\n"
        "for op in ('decode', 'dequant'):\n"
        "    assert f'wph_{op}' in render(default_config(Problem(op, 128, 1, 'turboquant_4bit_nc'))).text\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "tuner" / "templates"


def test_every_import_is_a_declared_dependency() -> None:
    """What the package imports is the standard library, itself, a dependency, or an optional peer."""
    import ast

    declared = {"cupy", "cupy_backends"}  # of cupy-cuda13x
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        declared.add(requirement.split("[")[0].split(">")[0].split("=")[0].replace("-", "_"))
    optional = {"vllm", "vllm_flash_attn", "flashinfer"}  # baselines that run only where they are installed
    known = set(sys.stdlib_module_names) | declared | optional | {"tuner"}
    for path in (ROOT / "tuner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in modules:
                assert module.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {module}"
