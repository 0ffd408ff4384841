"""vLLM's own TurboQuant tests with our decode in the place of its own. The file comes from its source distribution."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.space import Problem
from tuner.vllm import versions
from tuner.vllm.defaults import build_defaults, write

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "WPH_VLLM_TESTS"
FORMATS = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc")


def upstream_tests() -> Path:
    if versions.objection(versions.installed()) is not None:
        pytest.skip(f"no supported vLLM: {versions.objection(versions.installed())}")
    value = os.environ.get(VARIABLE)
    if not value or not Path(value).is_file():
        pytest.skip(f"{VARIABLE} does not name tests/quantization/test_turboquant.py of vLLM's source distribution")
    return Path(value).resolve()


def run(file: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    # No settings of a project that the file may lie in, and one process, which counts the calls.
    alone = ["-c", os.devnull, "--rootdir", str(file.parent), "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.upstream_decode", *alone, "-q", "-rs"]
    return subprocess.run(
        [*command, *arguments, str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
        cwd=file.parent,
        timeout=900,
    )


def test_what_needs_no_gpu_passes_under_our_plugin() -> None:
    done = run(upstream_tests(), "-k", "Config or Centroids or LloydMax")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 50


@pytest.mark.gpu
def test_all_of_it_passes_with_our_decode(tmp_path: Path) -> None:
    import torch

    file = upstream_tests()
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    problems = [Problem("decode", 128, gqa, name) for gqa in (1, 4) for name in FORMATS]
    for defaults in build_defaults(problems, arch):
        write(defaults, tmp_path)
    environment = {"VLLM_TUNED_CONFIG_FOLDER": str(tmp_path), "VLLM_CONFIG_ROOT": str(tmp_path / "none")}
    done = run(file, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "GPGPU not available" not in done.stdout
    assert int(re.findall(r"decode calls that our kernels ran: (\d+)", done.stdout)[0]) >= 2
