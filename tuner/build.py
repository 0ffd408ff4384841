"""Many sources x architectures to cubins in one ninja graph: parallel, incremental, content-addressed, atomic.

    <root>/cubins/<arch>/<key>/{kernel.cu, kernel.cubin, ptxas.txt, result.json, facts.json}
    <root>/failures/<arch>/<key>/{kernel.cu, ptxas.txt, result.json}

A key is a hash of everything that goes in: text, arch, compiler version, flags. It never is a hash of what comes
out, because nvcc puts a hash of the source's path into the cubin.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner import nvcc_job, toolchain
from tuner.errors import TunerError
from tuner.geometry import entry_points
from tuner.render import Source
from tuner.targets import get_target

NVCC_FLAGS = ("-std=c++17", "-O3", "-cubin", "-Xptxas", "-v")
_CANCEL_CHECK_S = 0.1
_STALE_S = 3600.0
"""Staging folders older than this belong to builders that were killed."""


@dataclass(frozen=True)
class Entry:
    """Resources of one kernel of a cubin, from ptxas. Registers per thread, spills as bytes stored plus loaded."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Built:
    """A cubin. Registers, spills, static shared memory and stack are the main kernel's; ``entries`` has them all."""

    digest: str
    arch: str
    cubin: Path
    cubin_sha256: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    stack_bytes: int
    seconds: float
    entry: str
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class BuildFailure:
    """A source that did not compile. ``kind`` is "compile", or "resource" (say, too much shared memory).

    ``message`` is the compiler's first error; ``log`` its whole output, the source beside it. ``retry``: the source may
    be fine (the compiler was killed, took too long, found no host compiler), so the next build tries again.
    """

    digest: str
    arch: str
    kind: str
    message: str
    log: Path
    retry: bool = False


@dataclass(frozen=True)
class _Job:
    """One source for one arch, and where its result belongs."""

    source: Source
    arch: str
    key: str
    root: Path

    @property
    def final(self) -> Path:
        return self.root / "cubins" / self.arch / self.key

    @property
    def failed(self) -> Path:
        return self.root / "failures" / self.arch / self.key

    @property
    def entry(self) -> str:
        return entry_points(self.source.config)[0]

    def result(self, *, final: bool = False) -> Built | BuildFailure | None:
        """What is on disk; ``final`` also takes failures that the next build would try again."""
        built = nvcc_job.read_result(self.final)
        if built:
            entries = {n: Entry(**e) for n, e in built["entries"].items()}
            e = entries[self.entry]
            return Built(
                self.source.digest, self.arch, self.final / "kernel.cubin", built["cubin_sha256"], e.registers,
                e.spill_bytes, e.shared_bytes, e.stack_bytes, built["seconds"], self.entry, entries,
            )  # fmt: skip
        failure = nvcc_job.read_result(self.failed)
        if failure is None and final and (self.failed / nvcc_job.RESULT).is_file():
            failure = json.loads((self.failed / nvcc_job.RESULT).read_text())
        if failure is None:
            return None
        log = self.failed / "ptxas.txt"
        retry = bool(failure.get("retry"))
        return BuildFailure(self.source.digest, self.arch, failure["kind"], failure["message"], log, retry)


def cache_key(text: str, arch: str, nvcc_version: str, flags: Iterable[str] = NVCC_FLAGS) -> str:
    """Content address of a cubin, in hex: a hash of all inputs."""
    inputs = json.dumps([text, arch, nvcc_version, list(flags)])
    return hashlib.sha256(inputs.encode()).hexdigest()[:40]


def _sweep(staging: Path) -> None:
    """Removes what killed builders left behind."""
    for folder in staging.iterdir():
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue


def _ninja_path(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _write_graph(jobs: list[_Job], folder: Path, nvcc: toolchain.Toolchain, gxx: Path, timeout_s: float) -> None:
    """``build.ninja`` and one description per edge, in ``folder``."""
    root = jobs[0].root
    (root / "locks").mkdir(exist_ok=True)
    script = Path(nvcc_job.__file__)
    lines = [
        f"builddir = {_ninja_path(folder)}",
        "rule nvcc",
        f"  command = {_ninja_path(sys.executable)} -I -S {_ninja_path(script)} $in",
        "  description = $out",
    ]
    for job in jobs:
        source = folder / f"{job.source.digest}.cu"
        if not source.exists():
            source.write_text(job.source.text)
        description: dict[str, Any] = {
            "command": [str(nvcc.nvcc), "-ccbin", str(gxx), *NVCC_FLAGS, f"-arch={job.arch}"],
            "source": str(source),
            "entry": job.entry,
            "final": str(job.final),
            "failed": str(job.failed),
            "staging": str(folder),
            # A few thousand lock files serve all keys: two keys that share one only wait for each other.
            "lock": str(root / "locks" / job.key[:3]),
            "timeout_s": timeout_s,
        }
        path = folder / f"{job.arch}-{job.key}.json"
        path.write_text(json.dumps(description))
        # The edge publishes the result itself; its output here only names it, and is never there beforehand.
        lines.append(f"build {_ninja_path(path.with_suffix('.published'))}: nvcc {_ninja_path(path)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def _run_ninja(
    folder: Path,
    env: Mapping[str, str],
    jobs: int | None,
    finished: Callable[[int], None],
    cancel: threading.Event | None,
) -> str:
    """Runs the graph, calls ``finished(edges)`` as edges end, returns ninja's output. Edges that fail are results."""
    parallel = jobs or len(os.sched_getaffinity(0))
    command = [str(toolchain.find_ninja()), "-C", str(folder), "-k", "0", "-j", str(parallel)]
    output = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**env, "NINJA_STATUS": "[%f] "},
    ) as process:
        assert process.stdout
        if cancel is not None:
            threading.Thread(target=_end_with, args=(process, cancel), daemon=True).start()
        try:
            for line in process.stdout:
                output.append(line)
                if match := re.match(r"\[(\d+)\] ", line):
                    finished(int(match[1]))
        except BaseException:
            process.terminate()  # ninja passes it on to the compilers
            raise
    return "".join(output)


def _end_with(process: subprocess.Popen[str], cancel: threading.Event) -> None:
    """Ends ``process`` once ``cancel`` is set; ninja passes it on to the compilers."""
    while process.poll() is None:
        if cancel.wait(_CANCEL_CHECK_S):
            process.terminate()
            return


def build(
    sources: Iterable[Source],
    archs: Iterable[str],
    *,
    root: Path = Path("build"),
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 120.0,
    cancel: threading.Event | None = None,
) -> dict[tuple[str, str], Built | BuildFailure]:
    """Compiles every source for every arch; results by (digest, arch). What was built before is not built again.

    ``progress(done, total)`` counts results. ``cancel``: once set, by another thread, the compilers are ended; what
    they had finished is kept. Raises ToolchainError where there is no compiler, UsageError for an unknown arch,
    TunerError where ``root`` is not writable, ninja itself fails or the build was cancelled.
    """
    archs = tuple(dict.fromkeys(archs))
    for arch in archs:
        get_target(arch)
    nvcc = toolchain.find(archs)
    root = root.resolve()
    wanted = {
        (s.digest, arch): _Job(s, arch, cache_key(s.text, arch, nvcc.version), root) for s in sources for arch in archs
    }
    results = {place: result for place, job in wanted.items() if (result := job.result())}
    missing = {place: job for place, job in wanted.items() if place not in results}
    report = progress or (lambda done, total: None)
    report(len(results), len(wanted))
    if not missing:
        return {place: results[place] for place in wanted}
    gxx = toolchain.find_gxx()
    staging = root / "staging"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        _sweep(staging)
        folder = Path(tempfile.mkdtemp(prefix="graph-", dir=staging))
        _write_graph(list(missing.values()), folder, nvcc, gxx, timeout_s)
    except OSError as e:
        raise TunerError(f"cannot write to the build folder {root}: {e.strerror}; run from another folder") from None
    try:
        before = len(results)
        output = _run_ninja(folder, nvcc.env, jobs, lambda edges: report(before + edges, len(wanted)), cancel)
        for place, job in missing.items():
            if result := job.result(final=True):
                results[place] = result
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lost = len(wanted) - len(results)
    if lost and cancel is not None and cancel.is_set():
        raise TunerError(f"the build was cancelled with {lost} of {len(missing)} kernels unbuilt")
    if lost:
        last = next(iter(reversed(output.strip().splitlines())), "no output")
        raise TunerError(f"ninja left {lost} of {len(missing)} kernels unbuilt: {last}")
    return {place: results[place] for place in wanted}
