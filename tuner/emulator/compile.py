"""Kernels to executables, with g++, once per text."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from tuner.emulator.report import EmulationError

DEFAULT_ROOT = Path("build")
_RUNTIME = Path(__file__).resolve().parent
# Kernels read shared memory as many types. Optimising costs more at compile time than it gains at run time.
_KERNEL_FLAGS = ("-std=c++17", "-O0", "-g1", "-fno-strict-aliasing", "-DWPH_EMULATE", "-w")
# The run time itself is trusted: it tells the sanitizer what it needs to know, and is fast.
_RUNTIME_FLAGS = ("-std=c++17", "-O2", "-g1", "-fno-strict-aliasing")
_ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__cluster_dims__\s*\(\s*(\d+),\s*1,\s*1\)\s*)?'
    r"(?:__launch_bounds__\s*\([^()]*\)\s*)?(\w+)\s*\("
)
_DYNAMIC_SHARED = re.compile(r"\bextern\s+__shared__\s+(?:__align__\s*\([^()]*\)\s*)?[\w\s]*?(\w+)\s*\[\s*\]")
_STATIC_SHARED = re.compile(r"(?<!extern )__shared__")


@dataclass(frozen=True)
class _Sanitizer:
    """The run time's file that speaks to it, of which an executable has one, and the compiler's options."""

    file: str
    flags: tuple[str, ...]


# A quarter of the compiler's time is saved by leaving out sizes of objects, which only optimising compilers know, null
# pointers and sums of pointers that wrap around, both of which the address sanitizer sees at the access, and by its
# calling a function to check an access.
_ADDRESS = _Sanitizer(
    "address.cpp",
    (
        "-fsanitize=address,undefined",
        "-fno-sanitize=object-size,null,pointer-overflow",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ),
)
_RACES = _Sanitizer("races.cpp", ("-fsanitize=thread",))


class HasText(Protocol):
    """Anything with the CUDA source in ``text``, a render.Source for example."""

    @property
    def text(self) -> str: ...


def compile_source(source: HasText, *, races: bool = False, root: Path = DEFAULT_ROOT) -> Path:
    """The emulated kernel as an executable, compiled once per text; raises EmulationError with g++'s first error.

    It runs under the address and undefined-behaviour sanitizers, or, where ``races``, under the thread sanitizer.
    """
    text = source.text
    entries = _ENTRY.findall(text)
    if not entries:
        raise EmulationError('no kernel in the source: expected extern "C" __global__ void name(...)')
    if _STATIC_SHARED.search(text):
        raise EmulationError("static __shared__ array: the emulator guards only extern __shared__, declare it so")
    sanitizer = _RACES if races else _ADDRESS
    flags = (*_KERNEL_FLAGS, *sanitizer.flags)
    key = _digest(text, _runtime_digest(), *flags)
    executable = root / "emulate" / key / "kernel"
    if executable.is_file():
        return executable.resolve()
    unused = {s.file for s in (_ADDRESS, _RACES)} - {sanitizer.file}
    objects = [o for o in sorted(_runtime(root).glob("*.o")) if o.with_suffix(".cpp").name not in unused]
    arrays = sorted(set(_DYNAMIC_SHARED.findall(text)))

    def build(folder: Path) -> None:
        (folder / "kernel.cu").write_text(text)
        calls = "".join(f"WPH_ENTRY({name}, {cluster or 1})\n" for cluster, name in entries)
        (folder / "main.cpp").write_text(f'#include "emulate.h"\n#include "kernel.cu"\n{calls}')
        symbols = [f"-Wl,--defsym={name}=wph_arena+16384" for name in arrays]
        inputs = ["main.cpp", *map(str, objects), *symbols]
        linker = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []  # takes half of the other one's time
        _gxx([*flags, f"-I{_RUNTIME}", *inputs, *linker, "-o", "kernel", "-ldl"], folder)
        (folder / "main.cpp").unlink()

    _publish(executable.parent, build)
    return executable.resolve()


def compile_many(
    sources: Iterable[HasText], *, races: bool = False, jobs: int = 2, root: Path = DEFAULT_ROOT
) -> list[Path]:
    """compile_source() of many sources, ``jobs`` at a time."""
    _runtime(root)  # once, rather than in every worker
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda source: compile_source(source, races=races, root=root), sources))


def _digest(*parts: str) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(f"{len(part)}\0{part}".encode())
    return state.hexdigest()[:32]


@lru_cache(maxsize=1)
def _compiler() -> tuple[str, str]:
    """Path and version line of g++."""
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        raise EmulationError("no g++ found: the emulator compiles kernels for the CPU; install g++ or set CXX")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return path, done.stdout.partition("\n")[0]


@lru_cache(maxsize=1)
def _runtime_digest() -> str:
    files = sorted(p for p in _RUNTIME.iterdir() if p.suffix in (".h", ".cpp"))
    return _digest(*_compiler(), *_RUNTIME_FLAGS, *(part for p in files for part in (p.name, p.read_text())))


def _runtime(root: Path) -> Path:
    """The folder with the run time's objects, compiled once, for either sanitizer."""
    folder = root / "emulate" / f"runtime-{_runtime_digest()}"
    sources = sorted(_RUNTIME.glob("*.cpp"))
    if not folder.is_dir():
        _publish(folder, lambda work: _gxx([*_RUNTIME_FLAGS, "-c", *map(str, sources)], work))
    return folder.resolve()


def _publish(folder: Path, build: Callable[[Path], None]) -> None:
    """Lets ``build`` fill a temporary folder and renames it to ``folder``: nobody sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder.parent))
    try:
        build(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _gxx(arguments: Sequence[str], folder: Path) -> None:
    done = subprocess.run([_compiler()[0], *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise EmulationError(f"g++: {first.strip()}", done.stderr)
