"""What this machine has and lacks, with the way out for each thing that is missing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from tuner import toolchain
from tuner.errors import TunerError
from tuner.findings import Finding
from tuner.render import template_folder, templates_digest
from tuner.targets import ARCHS

_PROBE = '#include <cuda_fp16.h>\nextern "C" __global__ void probe(__half *x) { x[threadIdx.x] = __float2half(1.f); }\n'
_COMPILE_TIMEOUT_S = 120
_NAME_BYTES = 256
_PACKAGES = (
    ("torch", "torch", "pip install torch"),
    ("triton", "triton", "pip install triton (without it the Triton baselines are left out)"),
    ("cupy", "cupy-cuda13x", "pip install cupy-cuda13x (without it nothing can be launched)"),
    ("optuna", "optuna", "pip install optuna (without it nothing can be searched)"),
    ("jinja2", "jinja2", "pip install jinja2"),
)


def _rejected(candidates: tuple[toolchain.Candidate, ...]) -> str:
    return "".join(f"; {c.source} {c.path or ''}".rstrip() + f": {c.detail}" for c in candidates if not c.ok)


def _smoke(nvcc: toolchain.Toolchain) -> str | None:
    """Compiles a kernel for every arch; the first error, or None."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(_PROBE)
        for arch in ARCHS:
            command = [str(nvcc.nvcc), "-cubin", f"-arch={arch}", "-o", f"{arch}.cubin", "probe.cu"]
            try:
                done = subprocess.run(
                    command, cwd=folder, env=dict(nvcc.env), capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
                )
            except (OSError, subprocess.TimeoutExpired) as e:
                return f"{arch}: {e}"
            if done.returncode:
                return f"{arch}: {next(iter((done.stderr + done.stdout).strip().splitlines()), 'no message')}"
    return None


def _nvcc() -> Finding:
    try:
        nvcc = toolchain.find()
        gxx = toolchain.find_gxx()
    except toolchain.ToolchainError as e:
        return Finding("nvcc", False, str(e), "set CUDA_HOME to a toolkit of 13.0 or later, or install this package")
    if error := _smoke(nvcc):
        return Finding("nvcc", False, f"{nvcc.nvcc} (from {nvcc.source}) does not compile for {error}", f"check {gxx}")
    others = _rejected(nvcc.candidates)
    detail = f"{nvcc.version} at {nvcc.nvcc} (from {nvcc.source}), compiles for {', '.join(ARCHS)}{others}"
    return Finding("nvcc", True, detail)


def _gxx() -> Finding:
    return Finding("g++", True, str(toolchain.find_gxx()))


def _ninja() -> Finding:
    return Finding("ninja", True, str(toolchain.find_ninja()))


def _nvdisasm() -> Finding:
    path = toolchain.find_nvdisasm()
    candidates = toolchain.nvdisasm_candidates()
    chosen = next(c for c in candidates if c.ok)
    detail = f"{chosen.detail} at {path} (from {chosen.source}){_rejected(candidates)}"
    return Finding("nvdisasm", True, detail)


def _gpu() -> Finding:
    """Asks the driver itself: importing torch for this would take seconds."""
    advice = "without a GPU kernels are built and their times predicted; measuring needs an NVIDIA GPU and its driver"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("GPU", False, "no NVIDIA driver (libcuda.so.1)", advice)
    if code := driver.cuInit(0):
        return Finding("GPU", False, f"the driver does not start (cuInit gives {code})", advice)
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for i in range(count.value):
        name = ctypes.create_string_buffer(_NAME_BYTES)
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetName(name, _NAME_BYTES, i)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, i)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, i)
        names.append(f"{name.value.decode()} (sm_{major.value}{minor.value})")
    cuda = f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if not names:
        return Finding("GPU", False, f"{cuda}, no device", advice)
    return Finding("GPU", True, f"{', '.join(names)}, {cuda}")


def _package(name: str, distribution: str, advice: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return Finding(name, False, f"{distribution} is not installed", advice)


def _templates() -> Finding:
    folder = template_folder()
    if not any(folder.glob("wph_*.cu.j2")):
        return Finding("templates", False, f"none in {folder}", "install the package again: its wheel carries them")
    return Finding("templates", True, f"{folder}, version {templates_digest()[:12]}")


def _build_folder(root: Path) -> Finding:
    """The nearest existing folder on the way to ``root`` must be writable."""
    folder = root.resolve()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return Finding("build folder", False, f"cannot write to {folder}", "run from a folder that you may write to")
    return Finding("build folder", True, str(root.resolve()))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of ``check``; an error is one too, with the way out that its message ends with."""
    try:
        return check()
    except TunerError as e:
        detail, _, advice = str(e).rpartition(": ")
        return Finding(name, False, detail or str(e), advice)
    except Exception as e:
        return Finding(name, False, f"{type(e).__name__}: {e}", "report this: a check must not fail")


def diagnose(root: Path = Path("build")) -> list[Finding]:
    """Checks compilers, disassembler, GPU, packages, templates, the build folder ``root`` and vLLM; never raises."""
    from tuner.vllm import diagnose as vllm

    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("nvcc", _nvcc),
        ("g++", _gxx),
        ("ninja", _ninja),
        ("nvdisasm", _nvdisasm),
        ("GPU", _gpu),
        *((name, partial(_package, name, distribution, advice)) for name, distribution, advice in _PACKAGES),
        ("templates", _templates),
        ("build folder", partial(_build_folder, root)),
        *vllm.checks(),
    ]
    return [_guarded(name, check) for name, check in checks]
