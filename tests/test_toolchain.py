"""Discovery of compilers and disassembler, and the reasons for every rejection."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tuner import toolchain
from tuner.targets import ARCHS
from tuner.toolchain import ToolchainError


def real_nvcc() -> Path:
    """An nvcc that is a program of its own, not a script that starts one."""
    for candidate in toolchain.nvcc_candidates():
        if candidate.ok and candidate.path and candidate.path.resolve().read_bytes()[:4] == b"\x7fELF":
            return candidate.path.resolve()
    pytest.skip("no nvcc binary on this machine: only a wrapper script")


def test_found_nvcc_compiles() -> None:
    nvcc = toolchain.find()
    assert nvcc.source in ("CUDA_HOME", "CUDA_PATH", "PATH", "/usr/local/cuda", "pip")
    assert nvcc.version in subprocess.run([nvcc.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    assert "NVCC_APPEND_FLAGS" not in nvcc.env
    chosen = next(c for c in nvcc.candidates if c.ok)
    assert (chosen.path, chosen.detail) == (nvcc.nvcc, nvcc.version)


def test_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = toolchain.find()
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc.nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert (toolchain.find().source, toolchain.find().nvcc) == ("CUDA_HOME", wrapper)


def test_incomplete_toolkit_is_rejected_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nvcc wheel without its companions is such a toolkit."""
    nvcc = real_nvcc()
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "nvcc.profile"):
        shutil.copy(nvcc.parent / name, tmp_path / "bin" / name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    first, *others = toolchain.nvcc_candidates()
    assert first.source == "CUDA_HOME"
    assert not first.ok
    assert "has no bin/ptxas" in first.detail
    assert any(c.ok for c in others)
    assert toolchain.find().source != "CUDA_HOME"


def test_missing_and_broken_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    home, path, *_ = toolchain.nvcc_candidates()
    assert (home.source, home.path, home.detail) == ("CUDA_HOME", None, "not there")
    assert (path.source, path.ok) == ("CUDA_PATH", False)
    assert "code 3: out of order" in path.detail


def test_unknown_arch_lists_every_candidate() -> None:
    with pytest.raises(ToolchainError, match="does not know sm_999") as raised:
        toolchain.find(["sm_999"])
    message = str(raised.value)
    assert "\n" not in message
    assert all(c.source in message for c in toolchain.nvcc_candidates(["sm_999"]))
    assert "CUDA_HOME" in message


def test_nvdisasm_knows_every_target() -> None:
    help_text = subprocess.run([toolchain.find_nvdisasm(), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"'{a.replace('sm_', 'SM')}'" in help_text for a in ARCHS)
    with pytest.raises(ToolchainError, match=r"nvdisasm .*does not know sm_999.*pip install"):
        toolchain.find_nvdisasm(["sm_999"])


def test_ninja_and_host_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert subprocess.run([toolchain.find_ninja(), "--version"], check=True, capture_output=True).stdout
    assert toolchain.find_gxx().is_file()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match="no-such-compiler is not on PATH; install g"):
        toolchain.find_gxx()
