"""As a person uses it: both packages pip-installed, no checkout in sight, `wph-tune install`, `doctor`, then vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tuner.vllm import versions

pytestmark = pytest.mark.vllm

if versions.objection(versions.installed()) is not None:
    pytest.skip(f"no supported vLLM: {versions.objection(versions.installed())}", allow_module_level=True)
if not [p for p in metadata.entry_points(group="vllm.general_plugins") if p.name == "wph"]:
    pytest.skip("this package is not pip-installed beside vLLM", allow_module_level=True)

COMMAND = Path(sys.executable).with_name("wph-tune")


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in ``folder``, which is also where vLLM looks for tables; nothing of the checkout is on its path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WPH_", "VLLM_", "PYTHON"))}
    env |= {"VLLM_TUNED_CONFIG_FOLDER": str(folder / "tuned"), "COLUMNS": "300"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, cwd=folder, timeout=600)


def test_install_then_doctor_then_uninstall(tmp_path: Path) -> None:
    done = run(COMMAND, "install", folder=tmp_path)
    assert done.returncode == 2 and "add --model" in done.stderr and "Traceback" not in done.stderr
    done = run(COMMAND, "install", "--model", "qwen3-4b", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    written = list((tmp_path / "tuned").glob("wph_default_*.json"))
    assert len(written) == 1 and f"wrote {written[0]} (2 default kernels)" in done.stdout
    assert "36 layers (head dim 128, 32/8 heads, turboquant_4bit_nc): " in done.stdout
    findings = run(COMMAND, "doctor", folder=tmp_path).stdout
    lines = {" ".join(line.split()[1:3]): line for line in findings.splitlines() if line.startswith(("ok", "no "))}
    for name in ("vLLM plugin", "vLLM seam", "vLLM tables"):
        assert lines[name].startswith("ok"), findings
    assert "1 sets of default kernels in" in lines["vLLM tables"]
    cubin = next((tmp_path / "tuned" / "kernels").iterdir())
    cubin.write_bytes(cubin.read_bytes()[:-1])
    assert run(COMMAND, "install", "--model", "qwen3-4b", folder=tmp_path).returncode == 0  # repairs it
    assert run(COMMAND, "install", "--uninstall", folder=tmp_path).returncode == 0
    assert not list((tmp_path / "tuned").rglob("*.*"))


def test_vllm_runs_the_installed_package(tmp_path: Path) -> None:
    code = """
import sys
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
backend = AttentionBackendEnum.TURBOQUANT.get_class()
import torch, tuner
print("RESULT", backend.__module__, backend.__name__, torch.cuda.is_initialized(), "site-packages" in tuner.__file__)
print("RESULT", sorted(n for n in sys.modules if n.split(".")[0] in ("optuna", "sqlalchemy")))
"""
    done = run(sys.executable, "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    words = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert words == ["tuner.vllm.backend WphTurboQuantBackend False True", "[]"]
