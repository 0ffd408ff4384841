"""Kernels written for the emulator's own tests, their arguments, and one call of each source."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tuner.emulate import EmulationError, Launch, emulate

KERNELS = Path(__file__).parent / "kernels"


class Params(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("a", "b", "c", "out")] + [("n", ctypes.c_int32)]


class Counting(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("a", "partials", "counter", "out")]


class Edges(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("data", "counter", "out")] + [("n", ctypes.c_int32)]


class Faults(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("out", ctypes.c_uint64), ("n", ctypes.c_int32)]


def source(name: str) -> SimpleNamespace:
    return SimpleNamespace(text=(KERNELS / name).read_text())


def run_primitive(root, entry, out, *, grid=1, block=32, shared=0, n=0, **kw):
    """``out`` after one launch of ``entry`` of primitives.cu; other arrays by the name of their parameter."""
    options = {k: kw.pop(k) for k in ("seed", "concurrent_ctas", "races") if k in kw}
    launch = Launch(entry, (grid, 1, 1), block, shared)
    emulate(source("primitives.cu"), launch, Params(n=n), kw | {"out": out}, root=root, **options)
    return out


def run_fault(root, entry, n=0, *, block=32, shared=256, data=None, seed=0, timeout_s=120.0):
    """Words [block] that one launch of ``entry`` of faults.cu wrote."""
    out = np.zeros(block, np.uint32)
    data = np.arange(256, dtype=np.uint8) if data is None else data
    launch = Launch(entry, (1, 1, 1), block, shared)
    buffers = {"data": data, "out": out}
    emulate(source("faults.cu"), launch, Faults(n=n), buffers, root=root, seed=seed, timeout_s=timeout_s)
    return out


def run_edge(root, entry, n, *, grid=1, **options):
    """Words [grid, 64] that ``entry`` of races.cu wrote; ``n`` 0 leaves its edge out."""
    out = np.zeros((grid, 64), np.uint32)
    buffers = {"data": np.arange(64, dtype=np.uint32) + 100, "counter": np.zeros(1, np.int32), "out": out}
    launch = Launch(entry, (grid, 1, 1), 64, 512)
    emulate(source("races.cu"), launch, Edges(n=n), buffers, races=True, root=root, **options)
    return out


def folder_for_races(tmp_path_factory):
    """A clean build directory; skips where no program runs under the thread sanitizer."""
    folder = tmp_path_factory.mktemp("build")
    try:
        run_edge(folder, "across_warps", 1)
    except EmulationError as error:
        skip_without_thread_sanitizer(error)
        raise
    return folder


def skip_without_thread_sanitizer(error: EmulationError) -> None:
    """Skips where ``error`` says that no program runs under the thread sanitizer here."""
    if reason := re.search("FATAL: ThreadSanitizer.*|cannot find .*tsan.*", error.report):
        pytest.skip(reason[0])
