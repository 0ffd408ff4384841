"""The doctor finds what is there and says what to do about what is not."""

from __future__ import annotations

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
