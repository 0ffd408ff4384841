"""Importing the package is cheap and pulls in nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tuner

HEAVY = ("torch", "triton", "optuna", "cupy", "cupy_backends", "jinja2", "numpy")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_fast_and_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import tuner; elapsed = time.perf_counter() - start;"
        f"print(elapsed, *[m for m in {HEAVY} if m in sys.modules])"
    )
    answers = [run(code).split() for _ in range(3)]
    assert all(answer[1:] == [] for answer in answers)
    assert min(float(answer[0]) for answer in answers) < 0.3


def test_measuring_parent_needs_no_gpu_library() -> None:
    heavy = tuple(m for m in HEAVY if m != "numpy")
    assert run(f"import sys, tuner.measure; print(*[m for m in {heavy} if m in sys.modules])").split() == []


def test_public_names_resolve() -> None:
    for name in tuner.__all__:
        assert callable(getattr(tuner, name))
        assert name in dir(tuner)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        _ = tuner.decode
