"""Standalone exports of the tables that come with the package: whose kernels they hold, and that those are the ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import ROOT, TUNE, refused, tune
from gpus import H100
from standalone_projects import build_project, shell

from tuner.errors import UsageError
from tuner.standalone.devices import devices, of_devices, of_target, rivals, short_name
from tuner.table import Table, read
from tuner.table.install import TABLE_PATTERN
from tuner.table.store import PACKAGE_TABLES
from tuner.targets import device_slug, get_target

TABLES = {path: read(path, cubins=False) for path in sorted(PACKAGE_TABLES.glob(TABLE_PATTERN))}
KNOWN = devices(TABLES.values())
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def smallest(op: str, device: str) -> Path:
    """The package's table with the fewest kernels."""
    found = [path for path, table in TABLES.items() if table.problem.op == op and table.device.slug == device]
    return min(found, key=lambda path: len(TABLES[path].kernels))


# --- whose tables -----------------------------------------------------------------------------------------------------


def test_the_plain_command_names_one_that_works(tmp_path: Path) -> None:
    done = tune("export", "--standalone", "--to", "wph", cwd=tmp_path, **NO_GPU)
    refused(done, 2, "NVIDIA H100 80GB HBM3 and NVIDIA H200 answer the same calls on sm_90", "--device")
    assert not list(tmp_path.iterdir())
    example = done.stderr.strip().partition("for example python tune.py ")[2]
    done = tune(*shlex.split(example), cwd=tmp_path, **NO_GPU)
    assert done.returncode == 0 and re.match(r"wph: \d+ kernels for sm_90;", done.stdout), done.stderr
    readme = (tmp_path / "wph/README.md").read_text()
    origins = re.findall(r"^Timed on (.*?), \d{4}-", readme, re.MULTILINE)
    assert len(origins) == sum("H100" in table.device.name for table in TABLES.values())
    assert set(origins) == {"NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], KNOWN),
        (["H200"], ["NVIDIA H200"]),
        (["h100", "NVIDIA_GB10"], ["NVIDIA GB10", "NVIDIA H100 80GB HBM3"]),
        (["hbm3 h100"], ["NVIDIA H100 80GB HBM3"]),
    ],
)
def test_a_device_is_named_by_words_of_its_name(names: list[str], expected: list[str]) -> None:
    found = of_devices(TABLES, names)
    assert devices(found.values()) == expected
    assert list(found) == [path for path, table in TABLES.items() if table.device.name in expected]


@pytest.mark.parametrize("name", ["L40S", "H20", "", "H100 GB10", "H200,H100"])
def test_an_unknown_device_is_refused_with_those_that_are_there(name: str) -> None:
    with pytest.raises(UsageError, match=f"no tables of a GPU '{name}': expected one of {', '.join(KNOWN)}"):
        of_devices(TABLES, ["H200", name])


def renamed(device: str) -> tuple[Path, Table]:
    path = smallest("decode", "NVIDIA_H200")
    table = TABLES[path]
    return Path(device), replace(table, device=replace(table.device, name=device))


def test_a_whole_name_comes_before_words_and_a_short_one_is_of_one_device() -> None:
    tables = dict(map(renamed, ("NVIDIA H100", "NVIDIA H100 PCIe")))
    assert devices(of_devices(tables, ["NVIDIA H100"]).values()) == ["NVIDIA H100"]
    assert devices(of_devices(tables, ["H100"]).values()) == ["NVIDIA H100", "NVIDIA H100 PCIe"]
    known = devices(tables.values())
    assert [short_name(device, known) for device in known] == ["NVIDIA H100", "PCIe"]
    assert [short_name(device, KNOWN) for device in KNOWN] == ["GB10", "H100", "H200"]


def test_only_tables_that_answer_the_same_calls_are_rivals() -> None:
    store, decode, h100 = (
        TABLES[smallest(*which)]
        for which in (("store", "NVIDIA_H200"), ("decode", "NVIDIA_H200"), ("decode", "NVIDIA_H100_80GB_HBM3"))
    )
    other = replace(decode, device=h100.device)
    assert rivals([store, decode]) == rivals([store, other]) == [] and rivals([store, decode, other])
    assert devices(rivals([store, decode, other])) == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert {table.device.arch for table in rivals(list(TABLES.values()))} == {"sm_90"}


def test_a_gpu_has_the_tables_of_its_family() -> None:
    tables = list(TABLES.values())
    hopper = get_target("sm_90")
    for name, expected in ((H100.name, [H100.name]), ("NVIDIA H200 NVL", ["NVIDIA H200"]), ("NVIDIA H800", [])):
        assert devices(of_target(tables, replace(hopper, device_name=name))) == expected


def test_copies_of_one_device(tmp_path: Path) -> None:
    paths = [smallest("decode", device) for device in ("NVIDIA_H200", "NVIDIA_GB10")]
    done = tune("export", *paths, "--device", "gb10", "--to", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["NVIDIA_GB10_sm_121"]


def test_what_cannot_be_written_whole_is_not_written(tmp_path: Path) -> None:
    path = smallest("store", "NVIDIA_H200")
    export = shlex.join([sys.executable, str(TUNE), "export", str(path), "--standalone", "--to", "wph"])
    full = ["bash", "-c", f"ulimit -f 8; exec {export}"]  # no file may be longer than 8 KiB
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # its file would be
    done = subprocess.run(full, cwd=tmp_path, env=unmeasured, capture_output=True, text=True)
    refused(done, 1, "cannot write wph/", "choose another folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "wph").mkdir()
    done = subprocess.run(full, cwd=tmp_path, env=unmeasured, capture_output=True, text=True)
    refused(done, 1, "cannot write wph/")
    assert not list((tmp_path / "wph").iterdir())


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a decode table of the H200, the smallest ones, with the dispatch's test built."""
    folder = tmp_path_factory.mktemp("tables")
    paths = [smallest(op, "NVIDIA_H200") for op in ("decode", "store")]
    found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = tune("export", *paths, "--standalone", "--to", "wph", cwd=folder, PYTHONPATH=found)
    assert done.returncode == 0, done.stderr
    kernels = sum(len(TABLES[path].kernels) for path in paths)
    assert done.stdout.startswith(f"wph: {kernels} kernels for sm_90;")
    build_project(folder / "wph", "Ninja", "test_dispatch")
    return folder / "wph"


def test_dispatch_agrees_with_the_tables_of_the_package(project: Path) -> None:
    done = shell("build/test_dispatch", cwd=project)
    assert done.returncode == 0 and re.match(r"\d\d+ calls agree", done.stdout), done.stderr


@pytest.mark.gpu
def test_kernels_of_the_package_pass_on_this_gpu(project: Path) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for sm_90")
    done = shell("cmake", "--build", "build", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    done = shell("ctest", "--test-dir", "build", "--output-on-failure", cwd=project)
    assert done.returncode == 0 and "100% tests passed" in done.stdout, done.stdout


@pytest.mark.gpu
def test_the_plain_command_takes_the_tables_of_this_gpu(tmp_path: Path) -> None:
    here = device_slug(torch.cuda.get_device_name())
    own = [path for path, table in TABLES.items() if table.device.slug == here]
    if here not in {table.device.slug for table in rivals(list(TABLES.values()))}:
        pytest.skip(f"no tables of another GPU answer the calls of {here}")
    done = tune("export", "--standalone", "--to", "wph", cwd=tmp_path)
    assert done.returncode == 0 and "the attached GPU; --device chooses others" in done.stdout, done.stderr
    kernels = sum(len(TABLES[path].kernels) for path in own)
    assert f"wph: {kernels} kernels for sm_90" in done.stdout
