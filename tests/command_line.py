"""``python tune.py`` in a process of its own, what a refusal looks like, and a table to hand to it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tuner.geometry import dynamic_shared_bytes
from tuner.render import render
from tuner.space import Problem, default_config
from tuner.table import BatchEntry, BucketEntry, Device, Kernel, Provenance, Table, Timing, kernel_id, write

ROOT = Path(__file__).resolve().parents[1]
TUNE = ROOT / "tune.py"
Done = subprocess.CompletedProcess[str]


def tune(*args: object, cwd: Path, timeout: float = 120, **env: str) -> Done:
    """Runs ``python tune.py *args`` in ``cwd``, where build/ and everything else it writes will be."""
    command = [sys.executable, str(TUNE), *map(str, args)]
    outside = ("VLLM_TUNED_CONFIG_FOLDER", "COLUMNS")  # xdist sets the latter, and tables wrap to it
    environment = {k: v for k, v in os.environ.items() if k not in outside} | env
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def refused(done: Done, code: int, *words: str) -> None:
    """``done`` failed with ``code`` and one line on standard error that has all ``words``."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert "unexpected" not in lines[0]


def make_table(folder: Path, *, evidence: str = "measured", digest: str | None = None, context: int = 4096) -> Path:
    """A table of one kernel in ``folder``. Its cubin is not code: nothing here loads it."""
    problem = Problem("decode", 128, 4, "turboquant_4bit_nc")
    config = default_config(problem)
    cubin = b"cubin of one kernel"
    sha = hashlib.sha256(cubin).hexdigest()
    name = kernel_id("sm_121", sha)
    timing = Timing(context, False, 20.0, 19.5, 20.5, 15.0, {"triton": 200.0}, "memory")
    shared = dynamic_shared_bytes(config)
    kernel = Kernel(name, config.params, digest or render(config).digest, sha, "sm_121", 128, shared, 0)
    table = Table(
        problem=problem,
        kv_heads=8,
        device=Device("NVIDIA GB10", "sm_121", 48),
        provenance=Provenance("2026-01-02T03:04:05Z", 0),
        evidence=evidence,
        kernels=(kernel,),
        by_batch=(BatchEntry(1, name, 4, 1.0, 1.0, (timing,)),),
        by_batch_and_context=(BucketEntry(1, name, 4, timing),),
    )
    return write(table, folder, {name: cubin})
