"""Tables of example kernels for a standalone export, and its build where nothing of this package is seen."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tuner import toolchain
from tuner.geometry import dynamic_shared_bytes
from tuner.render import render
from tuner.space import Config, Problem, default_config
from tuner.table import BatchEntry, BucketEntry, Device, Kernel, Provenance, Table, Timing, kernel_id

DECODE = Problem("decode", 128, 4, "turboquant_4bit_nc")
DEQUANT = Problem("dequant", 128, 1, "turboquant_4bit_nc")
STORE = Problem("store", 128, 1, "turboquant_4bit_nc")
NAMES = {"sm_90": "NVIDIA H200", "sm_121": "NVIDIA GB10"}


def timing(context: int, ragged: bool = False) -> Timing:
    return Timing(context, ragged, 20.0, 19.0, 21.0, 12.0, {"triton": 200.0}, "memory")


def make_table(configs: list[Config], arch: str = "sm_90", **changes: object) -> Table:
    """A measured table whose batches and contexts are spread over ``configs``."""
    made = []
    for config in configs:
        sha = hashlib.sha256(config.describe().encode()).hexdigest()
        digest = render(config).digest
        shared = dynamic_shared_bytes(config)
        made.append(Kernel(kernel_id(arch, sha), config.params, digest, sha, arch, 128, shared, 0))
    ids = [k.id for k in made]
    batches, contexts = (1, 4, 16), (1024, 16384)
    table = Table(
        problem=configs[0].problem,
        kv_heads=8,
        device=Device(NAMES[arch], arch, 132),
        provenance=Provenance("2026-01-01T00:00:00Z", 0, nvcc="13.0.88", git_commit="ab" * 20),
        evidence="measured",
        kernels=tuple(made),
        by_batch=tuple(
            BatchEntry(b, ids[-1 - i % len(ids)], 3 + i, 1.1, 1.0, (timing(1024),)) for i, b in enumerate(batches)
        ),
        by_batch_and_context=(
            *(BucketEntry(b, ids[(i + j) % len(ids)], 5 * i + j + 1, timing(c))
              for i, b in enumerate(batches) for j, c in enumerate(contexts)),
            BucketEntry(16, ids[0], 7, timing(16384, ragged=True)),
        ),
    )  # fmt: skip
    return replace(table, **changes)  # type: ignore[arg-type]


def decode_configs() -> list[Config]:
    """One of each kind that the launch must tell apart."""
    plain = default_config(DECODE)
    bulk = plain.with_(load="bulk", load_bytes=16, head_warps=4, schedule="stream")
    direct = plain.with_(load="direct", stages=1, reduction="kernel")
    rows = bulk.with_(load="bulk_rows", head_warps=8, warps=8)
    waiting = plain.with_(reduction="all_threads", schedule="allot", beginning="prompt")
    whole = bulk.with_(head_warps=8, warps=8, words="whole")
    return [plain, bulk, plain.with_(reduction="tree"), direct, rows, plain.with_(reduction="cluster8"), waiting, whole]


def all_tables(arch: str = "sm_90") -> list[Table]:
    others = [[default_config(problem)] for problem in (DEQUANT, STORE)]
    return [make_table(configs, arch) for configs in (decode_configs(), *others)]


TOOLS = ("cmake", "ctest", "ninja")


@cache
def folder_of_tools() -> Path:
    """The build tools alone, wherever they are installed."""
    folder = Path(tempfile.mkdtemp(prefix="wph-tools-"))
    atexit.register(shutil.rmtree, folder)
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def bare_environment() -> dict[str, str]:
    """Without this package, its environment, or anything else that a stranger's machine lacks. Where nvcc is a wheel's,
    it does not find the libraries beside it by itself.
    """
    nvcc = toolchain.find(("sm_90",)).nvcc
    path = f"{folder_of_tools()}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "HOME": "/nonexistent", "CUDACXX": str(nvcc), "LIBRARY_PATH": str(nvcc.parents[1] / "lib")}


def shell(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=bare_environment(), capture_output=True, text=True, timeout=600)


def build_project(folder: Path, generator: str, *targets: str) -> Path:
    """Configures and builds ``targets``, all without any; a user's log has no warnings."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=bare_environment()["PATH"])]
    if missing:
        pytest.skip(f"no {missing[0]}")
    chosen = ("--target", *targets) if targets else ()
    for command in (("cmake", "-B", "build", "-G", generator), ("cmake", "--build", "build", "-j2", *chosen)):
        done = shell(*command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    return folder / "build"
