"""Every kernel of the tables under compute-sanitizer: memcheck and racecheck over the gate's smallest cases.

    python benchmarks/sanitize.py --tables build/tables                  # all that are for the attached GPU
    python benchmarks/sanitize.py --tools memcheck --timeout 300         # what fits; without --tables: the package's

One line per kernel and tool, --jobs of them at a time; the tool's whole output is kept in --work. Ends with 1 where a
tool reports anything, or where a kernel was left out for want of time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import attached_gpu, ended, run_bounded  # noqa: E402
from tuner.errors import TunerError, UsageError  # noqa: E402
from tuner.table import Kernel, Table, read, read_cubin  # noqa: E402
from tuner.table.install import TABLE_PATTERN  # noqa: E402
from tuner.table.store import PACKAGE_TABLES  # noqa: E402

TOOLS = ("memcheck", "racecheck")
_FOUND = 9
"""Exit status of compute-sanitizer where it reports something."""
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


@dataclass(frozen=True)
class Subject:
    """A kernel, and where its cubin is."""

    table: Table
    kernel: Kernel
    cubin: Path

    @property
    def name(self) -> str:
        p = self.table.problem
        return f"{p.op} D={p.head_dim} group {p.gqa} {p.cache_format} {self.kernel.id}"


def subjects(folder: Path, arch: str) -> Iterator[Subject]:
    """The kernels of every table in ``folder`` that is for ``arch``. Raises TableError for a broken table."""
    for path in sorted(folder.glob(TABLE_PATTERN)):
        table = read(path)
        for kernel in table.kernels if table.device.arch == arch else ():
            read_cubin(path, table, kernel.id)
            yield Subject(table, kernel, path.parent / "kernels" / f"{kernel.id}.cubin")


def command(tool: str, sanitizer: str, subject: Subject) -> list[str]:
    """Runs the gate on ``subject`` under ``tool``."""
    config = json.dumps(subject.kernel.config(subject.table.problem).to_dict())
    child = [sys.executable, str(Path(__file__).resolve()), "--child", config, str(subject.cubin)]
    return [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), *child, str(subject.table.kv_heads)]


def summary(text: str) -> str:
    """The tool's last word."""
    found = _SUMMARY.findall(text)
    return found[-1].strip() if found else "no summary"


def gate(config: str, cubin: str, kv_heads: str) -> int:
    """The child: the gate's smallest cases, on the GPU."""
    from tuner.measure.child import Child
    from tuner.measure.parent import end_with_parent

    end_with_parent()
    request = {"config": json.loads(config), "cubin": cubin, "level": "tiny", "kv_heads": int(kv_heads)}
    answer = Child(0, 16, None, 0).check(request)
    print(answer)
    return 0 if isinstance(answer, dict) else 1


def run(args: argparse.Namespace) -> int:
    if args.child:
        return gate(*args.child)
    tools = args.tools.split(",")
    unknown = [t for t in tools if t not in TOOLS]
    if unknown:
        raise UsageError(f"--tools names {unknown[0]!r}: expected some of {', '.join(TOOLS)}")
    target = attached_gpu(0)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise TunerError("no compute-sanitizer on the PATH: it comes with the CUDA toolkit")
    args.work.mkdir(parents=True, exist_ok=True)
    asked = [(s, t) for s in subjects(args.tables, target.arch) for t in tools]
    deadline, stop = time.monotonic() + args.timeout, threading.Event()

    def examine(subject: Subject, tool: str) -> int | None:
        """Exit status of the tool; None where the time was over."""
        left = deadline - time.monotonic()
        if left <= 0 or stop.is_set():
            return None
        log = args.work / f"{subject.kernel.id}-{tool}.log"
        with log.open("w") as file:
            status = run_bounded(command(tool, sanitizer, subject), file, left, stop=stop)
        if status is not None:
            word = "clean" if status == 0 else "FOUND"
            print(f"{word} {tool:9} {subject.name}: {summary(log.read_text())}", flush=True)
        return status

    pool = ThreadPoolExecutor(args.jobs)
    try:
        found = [f.result() for f in [pool.submit(examine, *a) for a in asked]]
    finally:
        stop.set()  # an interrupt ends what runs, and nothing else begins
        pool.shutdown(cancel_futures=True)
    done, clean = sum(status is not None for status in found), found.count(0)
    print(f"{clean} of {done} clean; {len(asked) - done} not run; logs in {args.work}")
    return 0 if clean == len(asked) else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tables", type=Path, default=PACKAGE_TABLES, help="folder of tables (the package's)")
    made.add_argument("--tools", default=",".join(TOOLS), help=f"list (default: {','.join(TOOLS)})")
    made.add_argument("--timeout", type=float, default=600.0, help="seconds for all (600)")
    made.add_argument("--jobs", type=int, default=4, help="programs at a time (4)")
    made.add_argument("--work", type=Path, default=Path("build/sanitize"), help="where logs go")
    made.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
