"""What the plugin pulls into vLLM's processes, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

AT_RUN_TIME = (
    *("plugin", "startup", "layer", "dispatch", "defaults", "eligible", "scratch", "store", "summary", "timing"),
)
NEVER = ("optuna", "jinja2", "tuner.render", "tuner.build", "tuner.search", "tuner.reference", "tuner.baselines")


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_registering_imports_nothing_heavy() -> None:
    heavy = ("torch", "cupy", "cupy_backends", "triton", "jsonschema", *NEVER)
    code = f"import sys, tuner.vllm.plugin; print(*[m for m in {heavy} if m in sys.modules])"
    assert run(code) == []


def test_run_time_never_imports_the_searching_half_nor_starts_cuda() -> None:
    # Triton may come along with torch itself, so what counts is what is added to that.
    modules = ", ".join(f"tuner.vllm.{m}" for m in AT_RUN_TIME)
    code = (
        f"import sys, torch, cupy_backends; before = set(sys.modules); import {modules};"
        f"new = set(sys.modules) - before; print(torch.cuda.is_initialized(), 'tuner.vllm.layer' in new,"
        f"*sorted(m for m in new if m in {NEVER} or m.split('.')[0] in {('triton', *NEVER)}))"
    )
    assert run(code) == ["False", "True"]
