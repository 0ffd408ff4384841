"""Finds the compiler, the disassembler and their helpers, and remembers why a candidate was rejected."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from tuner.errors import TunerError
from tuner.targets import ARCHS

_PROBE_TIMEOUT_S = 30
_CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
# nvcc adds the contents of these to every command line: a build keyed on our own flags must not see them.
_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_PIP_NVCC = "pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]>=13.0.2,<13.1'"


class ToolchainError(TunerError):
    """A tool is missing or too old; the line says where it was looked for and how to get it."""


@dataclass(frozen=True)
class Candidate:
    """A place where a tool was looked for. ``detail`` is its version where it is fit for use, else why it is not."""

    source: str
    path: Path | None
    ok: bool
    detail: str


@dataclass(frozen=True)
class Toolchain:
    """An nvcc that works. ``env`` is the environment to start it with, ``source`` where it was found."""

    nvcc: Path
    version: str
    source: str
    env: Mapping[str, str]
    candidates: tuple[Candidate, ...]


def _wheel_file(distribution: str, ending: str) -> Path | None:
    """The installed file of a wheel whose path ends so, e.g. ``bin/nvcc``; None without wheel or file."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if f"/{file.as_posix()}".endswith(f"/{ending}"):
            path = Path(str(file.locate())).resolve()
            return path if path.is_file() else None
    return None


def _places(tool: str, wheels: Iterable[tuple[str, str]], *, wheel_first: bool) -> Iterator[tuple[str, Path | None]]:
    """Where ``tool`` may be, as (source, path); the path is None where the place has no such file."""
    toolkit: list[tuple[str, Path | None]] = []
    for variable in _CUDA_VARIABLES:
        if os.environ.get(variable):
            path = Path(os.environ[variable]) / "bin" / tool
            toolkit.append((variable, path if path.is_file() else None))
    on_path = shutil.which(tool)
    toolkit.append(("PATH", Path(on_path) if on_path else None))
    usual = Path("/usr/local/cuda/bin") / tool
    toolkit.append(("/usr/local/cuda", usual if usual.is_file() else None))
    pip = [("pip", _wheel_file(d, ending)) for d, ending in wheels]
    yield from (*pip, *toolkit) if wheel_first else (*toolkit, *pip)


def _output(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """Standard output and error of a probe; raises ToolchainError with the first line of what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, env=env, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ToolchainError(f"{command[0]} does not run: {e}") from None
    text = done.stdout + done.stderr
    if done.returncode:
        first = next(iter(text.strip().splitlines()), "no message")
        raise ToolchainError(f"{command[0]} fails with code {done.returncode}: {first}")
    return text


def _nvcc_env() -> dict[str, str]:
    return {n: v for n, v in os.environ.items() if n not in _FLAG_VARIABLES}


def _probe_nvcc(path: Path, archs: tuple[str, ...]) -> str:
    """The version of a complete nvcc that knows ``archs``; raises ToolchainError saying what it lacks."""
    env = _nvcc_env()
    found = re.search(r"V(\d+\.\d+\.\d+)", _output([str(path), "--version"], env))
    if not found:
        raise ToolchainError("prints no version")
    known = _output([str(path), "--list-gpu-code"], env).split()
    missing = [a for a in archs if a not in known]
    if missing:
        raise ToolchainError(f"version {found[1]} does not know {', '.join(missing)}")
    # A wheel of nvcc may come without the wheels of its parts; the dry run tells where nvcc itself looks for them.
    plan = _output([str(path), "--dryrun", "-cubin", f"-arch={archs[0]}", "probe.cu"], env)
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if top:
        root = Path(top[1].strip())
        for part in ("bin/ptxas", "nvvm/bin/cicc", "nvvm/libdevice/libdevice.10.bc"):
            if not (root / part).is_file():
                raise ToolchainError(f"version {found[1]} has no {part} in {root}")
        includes = [Path(p) for p in re.findall(r'"?-I"?([^" \n]+)', plan)]
        if includes and not any((i / "cuda_fp16.h").is_file() for i in includes):
            raise ToolchainError(f"version {found[1]} has no cuda_fp16.h in {includes[0]}")
    return found[1]


def _probe_nvdisasm(path: Path, archs: tuple[str, ...]) -> str:
    text = _output([str(path), "--help"])
    missing = [a for a in archs if f"'{a.replace('sm_', 'SM')}'" not in text]
    if missing:
        raise ToolchainError(f"does not know {', '.join(missing)}")
    if "--emit-json" not in text:
        raise ToolchainError("is too old for --emit-json")
    found = re.search(r"V(\d+\.\d+\.\d+)", _output([str(path), "--version"]))
    return found[1] if found else "unknown version"


def _judge(
    places: Iterable[tuple[str, Path | None]], probe: Callable[[Path, tuple[str, ...]], str], archs: tuple[str, ...]
) -> tuple[Candidate, ...]:
    judged = []
    for source, path in places:
        if path is None:
            judged.append(Candidate(source, None, False, "not there"))
            continue
        try:
            judged.append(Candidate(source, path, True, probe(path, archs)))
        except ToolchainError as e:
            judged.append(Candidate(source, path, False, str(e)))
    return tuple(judged)


def _surroundings() -> tuple[str, ...]:
    return tuple(os.environ.get(v, "") for v in (*_CUDA_VARIABLES, "PATH"))


@lru_cache(maxsize=8)
def _nvcc_candidates(archs: tuple[str, ...], surroundings: tuple[str, ...]) -> tuple[Candidate, ...]:
    places = _places("nvcc", [("nvidia-cuda-nvcc", "bin/nvcc")], wheel_first=False)
    return _judge(places, _probe_nvcc, archs)


@lru_cache(maxsize=8)
def _nvdisasm_candidates(archs: tuple[str, ...], surroundings: tuple[str, ...]) -> tuple[Candidate, ...]:
    # The wheel first: the project pins one that knows every target, the toolkit's may be older.
    wheels = [("nvidia-cuda-nvdisasm", "bin/nvdisasm"), ("triton", "triton/backends/nvidia/bin/nvdisasm")]
    return _judge(_places("nvdisasm", wheels, wheel_first=True), _probe_nvdisasm, archs)


def nvcc_candidates(archs: Iterable[str] = ARCHS) -> tuple[Candidate, ...]:
    """Every place where nvcc was looked for, in order of preference, with version or reason for rejection."""
    return _nvcc_candidates(tuple(archs), _surroundings())


def nvdisasm_candidates(archs: Iterable[str] = ARCHS) -> tuple[Candidate, ...]:
    """Every place where nvdisasm was looked for, in order of preference, with version or reason for rejection."""
    return _nvdisasm_candidates(tuple(archs), _surroundings())


def _choose(tool: str, candidates: tuple[Candidate, ...], advice: str) -> Candidate:
    for candidate in candidates:
        if candidate.ok:
            return candidate
    tried = "; ".join(f"{c.source}: {c.detail}" for c in candidates)
    raise ToolchainError(f"no usable {tool} ({tried}): {advice}")


def find(archs: Iterable[str] = ARCHS) -> Toolchain:
    """The first nvcc that compiles for ``archs``. Raises ToolchainError with every candidate's reason."""
    candidates = nvcc_candidates(archs)
    chosen = _choose("nvcc", candidates, f"set CUDA_HOME or {_PIP_NVCC}")
    assert chosen.path is not None
    return Toolchain(chosen.path, chosen.detail, chosen.source, _nvcc_env(), candidates)


def find_gxx() -> Path:
    """The host's C++ compiler: ``CXX`` where set, else ``g++``. Raises ToolchainError."""
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if not found:
        raise ToolchainError(f"no host compiler: {name} is not on PATH; install g++ (apt install g++)")
    return Path(found)


def find_ninja() -> Path:
    """Ninja's binary, from its wheel or PATH. Raises ToolchainError."""
    found = _wheel_file("ninja", "bin/ninja") or shutil.which("ninja")
    if not found:
        raise ToolchainError("no ninja in its wheel or on PATH: pip install ninja")
    return Path(found)


def find_nvdisasm(archs: Iterable[str] = ARCHS) -> Path:
    """A disassembler that knows ``archs``. Raises ToolchainError with every candidate's reason."""
    chosen = _choose("nvdisasm", nvdisasm_candidates(archs), "pip install 'nvidia-cuda-nvdisasm>=13.2'")
    assert chosen.path is not None
    return chosen.path
