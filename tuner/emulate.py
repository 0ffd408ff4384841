"""Runs a rendered kernel on the CPU, lane by lane, under address, undefined-behaviour and alignment sanitizers.

The source is compiled, unchanged, with g++ and ``-DWPH_EMULATE`` against ``tuner/emulator/emulate.h``, and runs in
a child process: whatever a kernel does wrong arrives here as an EmulationError.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tuner.errors import TunerError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DEFAULT_ROOT = Path("build")


SHARED_LIMIT_BYTES = 227 * 1024
_RUNTIME = Path(__file__).resolve().parent / "emulator"
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Kernels read shared memory as many types. Optimising costs more at compile time than it gains at run time.
_KERNEL_FLAGS = ("-std=c++17", "-O0", "-g1", "-fno-strict-aliasing", "-DWPH_EMULATE", "-w", *_SANITIZE)
# The run time itself is trusted: it tells AddressSanitizer what it needs to know, and is fast.
_RUNTIME_FLAGS = ("-std=c++17", "-O2", "-g1", "-fno-strict-aliasing")
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^()]*\)\s*)?(\w+)\s*\(')
_DYNAMIC_SHARED = re.compile(r"\bextern\s+__shared__\s+(?:__align__\s*\([^()]*\)\s*)?[\w\s]*?(\w+)\s*\[\s*\]")
_STATIC_SHARED = re.compile(r"(?<!extern )__shared__")


class HasText(Protocol):
    """Anything with the CUDA source in ``text``, a render.Source for example."""

    @property
    def text(self) -> str: ...


class EmulationError(TunerError):
    """The kernel did something wrong. The message is one line; ``report`` is all that the child process wrote."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Launch:
    """One launch: grid in CTAs (x, y, z), block in threads (a multiple of 32), dynamic shared memory in bytes."""

    entry: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0


def emulate(
    source: HasText,
    launches: Launch | Sequence[Launch],
    params: ctypes.Structure,
    buffers: Mapping[str, Tensor | NDArray[Any] | None],
    *,
    seed: int = 0,
    concurrent_ctas: int = 1,
    timeout_s: float = 120.0,
    root: Path = DEFAULT_ROOT,
) -> None:
    """Runs ``launches`` one after another, all with ``params``, and writes the buffers back in place.

    ``buffers`` maps each pointer field of ``params`` to a CPU tensor or array; None is a null pointer; a
    field left out keeps its value. A tensor stands for its whole storage, from which one byte too far on either side is an error;
    the pointer is that of its first element. Tensors that share a storage share a buffer. The storage starts on a
    256-byte boundary, as a CUDA allocation does.

    ``seed`` other than 0 shuffles the order of CTAs, warps and lanes (odd: each warp runs as far as it can, even:
    they mix); ``concurrent_ctas`` lets so many CTAs take turns.

    Raises EmulationError for anything that a sanitizer or the emulator finds, including divergent collectives,
    deadlocks and a run longer than ``timeout_s``; then the buffers are as before. Raises UsageError for arguments
    that no GPU would take.
    """
    launches = (launches,) if isinstance(launches, Launch) else tuple(launches)
    _check_launches(launches, concurrent_ctas)
    executable = compile_source(source, root=root)
    storages, pointers = _storages(params, buffers)
    request, buffers_at, data_at = _request(launches, params, storages, pointers, seed, concurrent_ctas)
    with tempfile.TemporaryDirectory(prefix="wph-emulate-") as folder:
        path = Path(folder) / "request"
        path.write_bytes(request)
        report, code = _run(executable, path, timeout_s)
        answer = path.read_bytes()
    place = _Status(*_STATUS.unpack_from(answer))
    if code != 0 or not place.done:
        names = {pointer[0]: name for name, pointer in reversed(pointers.items()) if pointer}
        starts = [_BUFFER.unpack_from(answer, buffers_at + i * _BUFFER.size)[3] for i in range(len(storages))]
        guarded = [(names[i], start, storages[i].size) for i, start in enumerate(starts)]
        raise _failure(source.text, report, code, timeout_s, place, launches, guarded)
    for at, storage in zip(data_at, storages, strict=True):
        ctypes.memmove(storage.address, answer[at : at + storage.size], storage.size)


def compile_source(source: HasText, *, root: Path = DEFAULT_ROOT) -> Path:
    """The emulated kernel as an executable, compiled once per text; raises EmulationError with g++'s first error."""
    text = source.text
    entries = _ENTRY.findall(text)
    if not entries:
        raise EmulationError('no kernel in the source: expected extern "C" __global__ void name(...)')
    if _STATIC_SHARED.search(text):
        raise EmulationError("static __shared__ array: the emulator guards only extern __shared__, declare it so")
    key = _digest(text, _runtime_digest(), *_KERNEL_FLAGS)
    executable = root / "emulate" / key / "kernel"
    if executable.is_file():
        return executable.resolve()
    objects = _runtime_objects(root)
    arrays = sorted(set(_DYNAMIC_SHARED.findall(text)))

    def build(folder: Path) -> None:
        (folder / "kernel.cu").write_text(text)
        calls = "".join(f"WPH_ENTRY({name})\n" for name in entries)
        (folder / "main.cpp").write_text(f'#include "emulate.h"\n#include "kernel.cu"\n{calls}')
        symbols = [f"-Wl,--defsym={name}=wph_arena+16384" for name in arrays]
        _gxx([*_KERNEL_FLAGS, f"-I{_RUNTIME}", "main.cpp", *map(str, objects), *symbols, "-o", "kernel", "-ldl"], folder)
        (folder / "main.cpp").unlink()

    _publish(executable.parent, build)
    return executable.resolve()


def compile_many(sources: Iterable[HasText], *, jobs: int = 2, root: Path = DEFAULT_ROOT) -> list[Path]:
    """compile_source() of many sources, ``jobs`` at a time."""
    _runtime_objects(root)  # once, rather than in every worker
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda source: compile_source(source, root=root), sources))


# --- compiling --------------------------------------------------------------------------------------------------------


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


def _runtime_objects(root: Path) -> list[Path]:
    folder = root / "emulate" / f"runtime-{_runtime_digest()}"
    sources = sorted(_RUNTIME.glob("*.cpp"))
    if not folder.is_dir():
        _publish(folder, lambda work: _gxx([*_RUNTIME_FLAGS, "-c", *map(str, sources)], work))
    return [(folder / source.name).with_suffix(".o").resolve() for source in sources]


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


# --- the request: see emulator/main.cpp -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    address: int
    size: int


@dataclass(frozen=True)
class _Status:
    """Where the child was: launch, CTA and thread; ``done`` is 1 after all launches."""

    launch: int
    x: int
    y: int
    z: int
    thread: int
    done: int


_STATUS = struct.Struct("=6i")
_HEADER = struct.Struct("=6i4I2I2Q")
_LAUNCH = struct.Struct("=64s3I2I4x")
_RELOCATION = struct.Struct("=2IQ")
_BUFFER = struct.Struct("=4Q")
_ALIGNMENT_BYTES = 256


def _check_launches(launches: Sequence[Launch], concurrent_ctas: int) -> None:
    for launch in launches:
        if launch.block % 32 or not 32 <= launch.block <= 1024:
            raise UsageError(f"{launch.entry}: block of {launch.block} threads: expected a multiple of 32 up to 1024")
        if min(launch.grid) < 1 or max(launch.grid[1:]) > 65535:
            raise UsageError(f"{launch.entry}: grid {launch.grid}: expected at least 1, y and z at most 65535")
        if not 0 <= launch.shared_bytes <= SHARED_LIMIT_BYTES:
            raise UsageError(
                f"{launch.entry}: {launch.shared_bytes} bytes of shared memory: expected 0 to {SHARED_LIMIT_BYTES}"
            )
    if concurrent_ctas < 1:
        raise UsageError(f"concurrent_ctas {concurrent_ctas}: expected at least 1")


def _storage(name: str, value: Any) -> tuple[_Storage, int]:
    """The memory that ``value`` is a part of, and the byte at which its first element is."""
    if hasattr(value, "untyped_storage"):
        if value.device.type != "cpu":
            raise UsageError(f"buffer {name} is on {value.device}: the emulator takes CPU tensors")
        storage = value.untyped_storage()
        return _Storage(storage.data_ptr(), storage.nbytes()), value.storage_offset() * value.element_size()
    if not hasattr(value, "__array_interface__"):
        raise UsageError(f"buffer {name} is a {type(value).__name__}: expected a torch tensor or a NumPy array")
    owner = value
    while hasattr(owner.base, "__array_interface__"):
        owner = owner.base
    if not owner.flags.forc:
        raise UsageError(f"buffer {name}: expected an array whose base is contiguous")
    address = owner.__array_interface__["data"][0]
    return _Storage(address, owner.nbytes), value.__array_interface__["data"][0] - address


def _storages(
    params: ctypes.Structure, buffers: Mapping[str, Any]
) -> tuple[list[_Storage], dict[str, tuple[int, int] | None]]:
    """The distinct storages, and for each field its storage's number and byte offset; None is a null pointer."""
    fields = {field[0] for field in params._fields_}
    numbers: dict[_Storage, int] = {}
    pointers: dict[str, tuple[int, int] | None] = {}
    for name, value in buffers.items():
        if name not in fields:
            raise UsageError(f"buffer {name}: {type(params).__name__} has no such field")
        pointers[name] = None
        if value is not None:
            storage, offset = _storage(name, value)
            pointers[name] = numbers.setdefault(storage, len(numbers)), offset
    return list(numbers), pointers


def _request(
    launches: Sequence[Launch],
    params: ctypes.Structure,
    storages: Sequence[_Storage],
    pointers: Mapping[str, tuple[int, int] | None],
    seed: int,
    concurrent_ctas: int,
) -> tuple[bytearray, int, list[int]]:
    """The request, where its buffer records start, and where each buffer's bytes do."""
    values = bytearray(bytes(params))
    relocations = b""
    for name, pointer in pointers.items():
        at = getattr(type(params), name).offset
        values[at : at + 8] = bytes(8)
        if pointer is not None:
            relocations += _RELOCATION.pack(at, *pointer)
    records = b"".join(_LAUNCH.pack(x.entry.encode(), *x.grid, x.block, x.shared_bytes) for x in launches)
    buffers_at = _HEADER.size + len(records) + len(relocations)
    params_at = buffers_at + len(storages) * _BUFFER.size
    data_at = []
    end = params_at + len(values)
    for storage in storages:
        data_at.append(end)
        end += storage.size
    counts = len(launches), len(relocations) // _RELOCATION.size, len(storages), concurrent_ctas
    header = _HEADER.pack(*[0] * 6, *counts, len(values), 0, seed & (2**64 - 1), params_at)
    buffers = b"".join(_BUFFER.pack(a, s.size, _ALIGNMENT_BYTES, 0) for a, s in zip(data_at, storages, strict=True))
    request = bytearray().join([header, records, relocations, buffers, values])
    for storage in storages:
        request += ctypes.string_at(storage.address, storage.size) if storage.size else b""
    return request, buffers_at, data_at


def _run(executable: Path, request: Path, timeout_s: float) -> tuple[str, int | None]:
    """What the child wrote to stderr, and its exit code; None where it ran out of time."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:redzone=2048:detect_stack_use_after_return=0:print_legend=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    try:
        done = subprocess.run(
            [executable, request], env=os.environ | options, stderr=subprocess.PIPE, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as e:
        return (e.stderr or b"").decode(errors="replace"), None
    return done.stderr.decode(errors="replace"), done.returncode


# --- reports ----------------------------------------------------------------------------------------------------------

_OWN = re.compile(r"^wph-emulate: line (\d+): (.*)$", re.M)
_UNDEFINED = re.compile(r"^\S+:\d+:\d+: runtime error: (.*)$", re.M)
_ADDRESS = re.compile(r"ERROR: AddressSanitizer:? (\S+)(?:.*?(0x[0-9a-f]+))?.*$", re.M)
_ACCESS = re.compile(r"^(?:READ|WRITE) of size \d+", re.M)
_KERNEL_LINE = re.compile(r"\bkernel\.cu:(\d+)")


def _buffer_place(address: int, buffers: Sequence[tuple[str, int, int]]) -> str:
    """Where ``address`` is relative to the nearest buffer of (name, address, bytes)."""
    near = [(max(start - address, address - (start + size), 0), n, start, size) for n, start, size in buffers if start]
    if not near or min(near)[0] > 1 << 20:
        return ""
    _, name, start, size = min(near)
    return f" at byte {address - start} of {name}, which has {size}"


def _failure(
    text: str,
    report: str,
    code: int | None,
    timeout_s: float,
    place: _Status,
    launches: Sequence[Launch],
    buffers: Sequence[tuple[str, int, int]],
) -> EmulationError:
    own, undefined, address = _OWN.search(report), _UNDEFINED.search(report), _ADDRESS.search(report)
    line, what = 0, f"the process ended with {code}: {(report.splitlines() or ['no message'])[0]}"
    if code is None:
        what = f"no end after {timeout_s:g} s"
    elif address:
        access = _ACCESS.search(report)
        where = _buffer_place(int(address[2], 16), buffers) if address[2] else ""
        what = f"{own[2] + ': ' if own else ''}{address[1]}{': ' + access[0] if access else ''}{where}"
    elif undefined:
        what = undefined[1]
    elif own:
        what = own[2]
    if own:
        line = int(own[1])
    elif code is not None and (frame := _KERNEL_LINE.search(report)):
        line = int(frame[1])
    entry = launches[place.launch].entry
    message = f"{entry}, CTA ({place.x}, {place.y}, {place.z}), thread {place.thread}: {what}"
    lines = text.splitlines()
    if 1 <= line <= len(lines):
        message += f"; line {line}: {lines[line - 1].strip()}"
    return EmulationError(message, report)
