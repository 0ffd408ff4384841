"""What a GPU is asked before a release, the most important first: tests, tables, sanitizers, every benchmark.

    python benchmarks/release.py --list                # the steps and their commands
    python benchmarks/release.py --budget 1500         # as many as fit; the same command goes on with the rest
    python benchmarks/release.py --only tables,grid    # some of them, again
    python benchmarks/release.py --forget              # begin anew

A step is a command of its own, bounded in time; its output goes to --work, its last lines to the terminal. What ended
with 0 is not run again. New tables go to --work/tables with their kernels, from where `--publish` copies them into the
package.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import attached_gpu, ended, run_bounded  # noqa: E402
from tuner.errors import UsageError  # noqa: E402
from tuner.table import read, read_cubin, write  # noqa: E402
from tuner.table.install import TABLE_PATTERN  # noqa: E402
from tuner.table.store import FOLDER_VARIABLE, PACKAGE_TABLES  # noqa: E402

TAIL_LINES = 6
_LEAST_S = 15.0
"""A step is not begun with less time than this."""


@dataclass(frozen=True)
class Step:
    """``command`` without the interpreter; ``seconds``: the most it may take. Steps of a ``group`` belong together."""

    name: str
    group: str
    command: tuple[str, ...]
    seconds: float


def _tune(name: str, options: str, search_s: int, races_s: int) -> Step:
    limits = ("--timeout", str(search_s), "--race-timeout", str(races_s))
    command = ("tune.py", *options.split(), *limits, "--output", "TABLES", "--recordings", "RECORDINGS")
    return Step(f"tune-{name}", "tables", command, search_s + races_s + 90)


_GRID = ("benchmarks/decode_grid.py", "--tables", "TABLES", "--work", "WORK/grid")
_WARPS = ("tune.py", "--head-dim", "256", "--op", "dequant", "--warps", "1,2,4,8,16")
_SANITIZE = ("--jobs", "12", "--timeout", "240")
STEPS = (
    Step("gpu-tests", "tests", ("-m", "pytest", "-q", "-m", "gpu", "--durations=15"), 400),
    _tune("d128-g4", "--head-dim 128", 60, 60),
    _tune("d256-g8", "--head-dim 256", 60, 60),
    _tune("d256-g16", "--head-dim 256 --gqa 16", 50, 50),
    _tune("d512-g8", "--head-dim 512", 50, 50),
    _tune("d128-g4-k8v4", "--head-dim 128 --kv-cache-dtype turboquant_k8v4", 40, 50),
    _tune("d128-g16", "--head-dim 128 --gqa 16 --kv-heads 2", 40, 45),
    _tune("d128-g8", "--head-dim 128 --gqa 8", 40, 45),
    _tune("d256-g6", "--head-dim 256 --gqa 6 --kv-heads 4", 40, 45),
    _tune("d128-g1", "--head-dim 128 --gqa 1 --kv-heads 32", 40, 45),
    _tune("d256-g8-k8v4", "--head-dim 256 --kv-cache-dtype turboquant_k8v4", 40, 45),
    _tune("store-d128", "--head-dim 128 --op store", 30, 20),
    Step("grid", "grid", (*_GRID, "--timeout", "520"), 580),
    Step("sanitize", "sanitize", ("benchmarks/sanitize.py", "--tables", "TABLES", *_SANITIZE), 300),
    Step("dequant-warps", "layouts", (*_WARPS, "--timeout", "60", "--race-timeout", "30"), 150),
    Step("store", "store", ("benchmarks/store.py", "--head-dims", "128", "--tables", "TABLES"), 120),
    Step("incremental", "store", ("benchmarks/incremental.py", "--quick"), 90),
    Step("bench-qwen3.5", "models", ("tune.py", "bench", "--model", "qwen3.5-122b"), 120),
    Step("bench-nemotron", "models", ("tune.py", "bench", "--model", "nemotron-h-120b"), 120),
    Step("layouts-decode", "layouts", ("benchmarks/layout_study.py", "--op", "decode", "--timeout", "150"), 200),
    Step("layouts-dequant", "layouts", ("benchmarks/layout_study.py", "--op", "dequant", "--timeout", "150"), 200),
    Step("grid-formats", "grid", (*_GRID, "--formats", "all", "--dequant", "--timeout", "300"), 360),
    Step("engine", "engine", ("benchmarks/vllm_engine.py", "--tables", "TABLES", "--quick"), 580),
)


def argv(step: Step, work: Path) -> list[str]:
    """What is run: the interpreter, and ``work``'s folders in the place of their names."""
    places = {"TABLES": str(work / "tables"), "RECORDINGS": str(work / "recordings"), "WORK": str(work)}
    words = [places.get(word, word.replace("WORK/", f"{work}/")) for word in step.command]
    return [sys.executable, *words]


def environment(step: Step, work: Path) -> dict[str, str]:
    """Ours; a step that benchmarks what the API chooses finds ``work``'s tables first."""
    new = {FOLDER_VARIABLE: str(work / "tables")} if step.group in ("store", "models") else {}
    return os.environ | new


class Ledger:
    """Which steps are done, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, name: str, seconds: float) -> None:
        self.done[name] = round(seconds, 1)
        self._path.write_text(json.dumps(self.done, indent=1) + "\n")


def chosen(steps: Sequence[Step], only: str) -> list[Step]:
    """Those whose name or group ``only`` lists; all where it is empty. Raises UsageError for a name of neither."""
    names = [n for n in only.split(",") if n]
    known = {s.name for s in steps} | {s.group for s in steps}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise UsageError(f"--only names {unknown[0]!r}: expected steps or groups of --list")
    return [s for s in steps if not names or s.name in names or s.group in names]


def carry_out(steps: Sequence[Step], work: Path, budget_s: float, again: bool = False) -> list[str]:
    """Runs what is not done; names of the steps that failed or were not reached."""
    work.mkdir(parents=True, exist_ok=True)
    ledger, deadline, left_over = Ledger(work / "done.json"), time.monotonic() + budget_s, []
    for step in steps:
        if step.name in ledger.done and not again:
            print(f"{step.name}: done before, in {ledger.done[step.name]:g} s", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            left_over.append(step.name)
            continue
        start, log = time.monotonic(), work / f"{step.name}.log"
        with log.open("w") as file:
            status = run_bounded(argv(step, work), file, min(step.seconds, left), cwd=ROOT, env=environment(step, work))
        seconds = time.monotonic() - start
        outcome = "out of time" if status is None else "done" if status == 0 else f"ended with {status}"
        print(f"{step.name}: {outcome} after {seconds:.0f} s; {log}", flush=True)
        for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
            print(f"    {line[:160]}", flush=True)
        if status == 0:
            ledger.add(step.name, seconds)
        else:
            left_over.append(step.name)
    return left_over


def publish(folder: Path, package: Path) -> list[Path]:
    """Copies verified tables of ``folder`` into ``package`` over those of their names; cubins that none names go."""
    written = []
    for path in sorted(folder.glob(TABLE_PATTERN)):
        table = read(path)
        written.append(write(table, package, {k.id: read_cubin(path, table, k.id) for k in table.kernels}))
    named = {k.id for path in package.glob(TABLE_PATTERN) for k in read(path).kernels}
    for cubin in (package / "kernels").glob("*.cubin"):
        if cubin.stem not in named:
            cubin.unlink()
    return written


def run(args: argparse.Namespace) -> int:
    steps, args.work = chosen(STEPS, args.only), args.work.resolve()
    if args.list:
        for step in steps:
            print(f"{step.group:9} {step.name:16} {step.seconds:4.0f} s  python {' '.join(argv(step, args.work)[1:])}")
        return 0
    if args.publish:
        for path in publish(args.work / "tables", PACKAGE_TABLES):
            print(f"wrote {path}")
        return 0
    if args.forget:
        shutil.rmtree(args.work, ignore_errors=True)
        return 0
    attached_gpu(0)
    left_over = carry_out(steps, args.work, args.budget, again=bool(args.only))
    if left_over:
        print(f"not done: {', '.join(left_over)}")
    return 1 if left_over else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--budget", type=float, default=3600.0, metavar="S", help="seconds for all (3600)")
    made.add_argument("--only", default="", metavar="LIST", help="steps or groups, done before or not")
    made.add_argument("--work", type=Path, default=Path("build/release"), help="logs, tables, what is done")
    made.add_argument("--list", action="store_true", help="print the steps and run nothing")
    made.add_argument("--publish", action="store_true", help="copy the new tables into the package and run nothing")
    made.add_argument("--forget", action="store_true", help="remove --work and run nothing")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
