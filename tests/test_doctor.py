"""The doctor finds what is there and says what to do about what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.doctor import diagnose


def test_every_check_reports(tmp_path: Path) -> None:
    found = {f.name: f for f in diagnose(tmp_path / "build")}
    assert {"nvcc", "g++", "ninja", "nvdisasm", "GPU", "torch", "triton", "templates", "build folder"} <= found.keys()
    for name in ("nvcc", "g++", "ninja", "nvdisasm", "jinja2", "templates", "build folder"):
        assert found[name].ok, found[name]
    assert "compiles for sm_90, sm_100, sm_120, sm_121" in found["nvcc"].detail
    for finding in found.values():
        assert finding.detail
        assert bool(finding.advice) != finding.ok
    assert not (tmp_path / "build").exists()


def test_broken_compiler_is_reported_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = {f.name: f for f in diagnose(tmp_path)}
    assert not found["g++"].ok
    assert "install g++" in found["g++"].advice + found["g++"].detail
    assert not found["nvcc"].ok
    assert found["nvcc"].advice


def test_unusable_build_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = {f.name: f for f in diagnose(tmp_path / "file" / "build")}
    assert not found["build folder"].ok
    assert "write" in found["build folder"].advice


DRIVER = r"""
#include <cstring>
extern "C" {
int cuInit(unsigned) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGetName(char *name, int, int device) { std::strcpy(name, device ? "Second" : "First"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device ? 12 : 9) : (device ? 1 : 0);
    return 0;
}
}
"""


@pytest.mark.parametrize(
    ("init", "count", "ok", "detail"),
    [
        (0, 2, True, "First (sm_90), Second (sm_121), driver for CUDA 13.1"),
        (0, 0, False, "driver for CUDA 13.1, no device"),
        (999, 0, False, "the driver does not start (cuInit gives 999)"),
    ],
)
def test_what_the_driver_says_about_gpus(init: int, count: int, ok: bool, detail: str, tmp_path: Path) -> None:
    """With a library of the driver's name and signatures."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    command = ["g++", "-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}", "-o", "libcuda.so.1", "driver.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = "from tuner.doctor import _gpu; f = _gpu(); print(f.ok, f.detail, sep='|')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
    )
    assert done.stdout.strip() == f"{ok}|{detail}"
