"""What a GPU is asked before a release, the most important first: tests, tables, sanitizers, every benchmark.

    python benchmarks/release.py --list                # the steps and their commands
    python benchmarks/release.py --budget 1500         # as many as fit; the same command goes on with the rest
    python benchmarks/release.py --only tables,grid    # some of them, again
    python benchmarks/release.py --gpus 0,1,2,3        # a step on each GPU at a time
    python benchmarks/release.py --forget              # begin anew

A step is a command of its own, bounded in time; its output goes to --work, its last lines to the terminal. What ended
with 0 is not run again. New tables go to --work/tables with their kernels, from where `--publish` copies them into the
package. GPUs at work on one host make each other's launches late (by 1.4 to 1.8 us on the H200s tried): tables may be
made so, since all kernels are as late, but figures are better measured without --gpus. The cores are divided among the
GPUs: a step has its part of them, whatever the other GPUs do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LEAST_S = 15.0
"""A step is not begun with less time than this."""


@dataclass(frozen=True)
class Step:
    """``command`` without the interpreter; ``seconds``: the most it may take. Steps of a ``group`` belong together.

    ``after``: steps and groups that end before it begins, whatever became of them.
    """

    name: str
    group: str
    command: tuple[str, ...]
    seconds: float
    after: tuple[str, ...] = ()


def _tune(name: str, options: str, search_s: int, races_s: int) -> Step:
    limits = ("--timeout", str(search_s), "--race-timeout", str(races_s))
    command = ("tune.py", *options.split(), *limits, "--output", "TABLES", "--recordings", "RECORDINGS")
    return Step(f"tune-{name}", "tables", command, search_s + races_s + 90)


def _bench(name: str, group: str, seconds: float, *words: str) -> Step:
    """One that runs the tables."""
    return Step(name, group, words, seconds, after=("tables",))


def _part_of_grid(number: int, shapes: str) -> Step:
    return _bench(f"grid-{number}", "grid", 200, *_GRID, "--shapes", shapes, "--timeout", "180")


_GRID = ("benchmarks/decode_grid.py", "--tables", "TABLES", "--work", "WORK/grid")
_WARPS = ("tune.py", "--head-dim", "256", "--op", "dequant", "--warps", "1,2,4,8,16")
_SANITIZE = ("--jobs", "12", "--timeout", "390")
STEPS = (
    Step("gpu-tests", "tests", ("-m", "pytest", "-q", "-m", "gpu", "--durations=15"), 520),
    _tune("d128-g4", "--head-dim 128", 60, 60),
    _tune("d256-g8", "--head-dim 256", 60, 60),
    _tune("d256-g16", "--head-dim 256 --gqa 16", 50, 50),
    _tune("d512-g8", "--head-dim 512", 50, 50),
    _tune("d128-g4-k8v4", "--head-dim 128 --kv-cache-dtype turboquant_k8v4", 40, 50),
    _tune("d128-g16", "--head-dim 128 --gqa 16 --kv-heads 2", 40, 45),
    _tune("d128-g8", "--head-dim 128 --gqa 8", 40, 45),
    _tune("d256-g6", "--head-dim 256 --gqa 6 --kv-heads 4", 40, 45),
    _tune("d128-g1", "--head-dim 128 --gqa 1 --kv-heads 32", 90, 60),
    _tune("d256-g8-k8v4", "--head-dim 256 --kv-cache-dtype turboquant_k8v4", 40, 45),
    _tune("d128-g4-k3v4", "--head-dim 128 --kv-cache-dtype turboquant_k3v4_nc", 40, 15),
    _tune("d128-g4-3bit", "--head-dim 128 --kv-cache-dtype turboquant_3bit_nc", 40, 15),
    _tune("store-d128", "--head-dim 128 --op store", 30, 20),
    _part_of_grid(1, "128:32:8,512:32:4"),
    _part_of_grid(2, "128:32:32"),
    _part_of_grid(3, "256:32:2,256:16:2"),
    _part_of_grid(4, "128:64:8,256:24:4"),
    Step("grid", "grid", (*_GRID, "--timeout", "520"), 580, after=("grid-1", "grid-2", "grid-3", "grid-4")),
    _bench("sanitize", "sanitize", 420, "benchmarks/sanitize.py", "--tables", "TABLES", *_SANITIZE),
    Step("dequant-warps", "layouts", (*_WARPS, "--timeout", "60", "--race-timeout", "30"), 150),
    _bench("store", "store", 120, "benchmarks/store.py", "--head-dims", "128", "--tables", "TABLES"),
    _bench("incremental", "store", 240, "benchmarks/incremental.py", "--quick"),
    _bench("bench-qwen3.5", "models", 120, "tune.py", "bench", "--model", "qwen3.5-122b"),
    _bench("bench-nemotron", "models", 120, "tune.py", "bench", "--model", "nemotron-h-120b"),
    Step("layouts-decode", "layouts", ("benchmarks/layout_study.py", "--op", "decode", "--timeout", "150"), 200),
    Step("layouts-dequant", "layouts", ("benchmarks/layout_study.py", "--op", "dequant", "--timeout", "150"), 200),
    Step("grid-formats", "grid", (*_GRID, "--formats", "all", "--dequant", "--timeout", "300"), 360, after=("grid",)),
    _bench("engine", "engine", 580, "benchmarks/vllm_engine.py", "--tables", "TABLES", "--quick"),
)


def argv(step: Step, work: Path) -> list[str]:
    """What is run: the interpreter, and ``work``'s folders in the place of their names."""
    places = {"TABLES": str(work / "tables"), "RECORDINGS": str(work / "recordings"), "WORK": str(work)}
    words = [places.get(word, word.replace("WORK/", f"{work}/")) for word in step.command]
    return [sys.executable, *words]


def environment(step: Step, work: Path, gpu: str | None = None) -> dict[str, str]:
    """Ours; a step that benchmarks what the API chooses finds ``work``'s tables first; of GPUs it sees ``gpu`` only."""
    new = {FOLDER_VARIABLE: str(work / "tables")} if step.group in ("store", "models") else {}
    return os.environ | new | ({} if gpu is None else {_VISIBLE: visible(gpu)})


def visible(gpu: str) -> str:
    """What a process that is to see only GPU ``gpu`` of those that this one sees has in CUDA_VISIBLE_DEVICES."""
    ours = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    return ours[int(gpu)] if ours else gpu


def share_of_cores(number: int, of: int) -> set[int]:
    """Cores for the ``number``th of ``of`` GPUs: those that this process may use, divided; where they are too few, one
    that others have, too."""
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[number::of]) or {cores[number % len(cores)]}


class Ledger:
    """Which steps are done, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, name: str, seconds: float) -> None:
        self.done[name] = round(seconds, 1)
        self._path.write_text(json.dumps(self.done, indent=1) + "\n")


class Line:
    """Steps that wait for a GPU. Any thread may ask."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._waiting, self._running = list(steps), list[Step]()
        self._change = threading.Condition()

    def take(self) -> Step | None:
        """The first step that may begin, once there is one; None where none is left."""
        with self._change:
            while self._waiting:
                step = next(filter(self._may_begin, self._waiting), None)
                if step is not None:
                    self._waiting.remove(step)
                    self._running.append(step)
                    return step
                self._change.wait()
            return None

    def _may_begin(self, step: Step) -> bool:
        others = [s for s in (*self._waiting, *self._running) if s is not step]
        return not any(n in step.after for s in others for n in (s.name, s.group))

    def end(self, step: Step) -> None:
        with self._change:
            self._running.remove(step)
            self._change.notify_all()


def chosen(steps: Sequence[Step], only: str) -> list[Step]:
    """Those whose name or group ``only`` lists; all where it is empty. Raises UsageError for a name of neither."""
    names = [n for n in only.split(",") if n]
    known = {s.name for s in steps} | {s.group for s in steps}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise UsageError(f"--only names {unknown[0]!r}: expected steps or groups of --list")
    return [s for s in steps if not names or s.name in names or s.group in names]


def carry_out(
    steps: Sequence[Step], work: Path, budget_s: float, again: bool = False, gpus: Sequence[str] = ()
) -> list[str]:
    """Runs what is not done, a step at a time or one on each of ``gpus``; names of those that failed or were not
    reached, in their order.
    """
    work.mkdir(parents=True, exist_ok=True)
    ledger, deadline, stop = Ledger(work / "done.json"), time.monotonic() + budget_s, threading.Event()
    done_before = [] if again else [s for s in steps if s.name in ledger.done]
    for step in done_before:
        print(f"{step.name}: done before, in {ledger.done[step.name]:g} s", flush=True)
    asked = [s for s in steps if s not in done_before]
    line, left_over, lock = Line(asked), set[str](), threading.Lock()

    def carry_out_one(step: Step, gpu: str | None) -> None:
        left = deadline - time.monotonic()
        log, start = work / f"{step.name}.log", time.monotonic()
        status: int | None = None
        if left >= _LEAST_S and not stop.is_set():
            env = environment(step, work, gpu)
            with log.open("w") as file:
                status = run_bounded(argv(step, work), file, min(step.seconds, left), cwd=ROOT, env=env, stop=stop)
            with lock:
                tell(step, status, time.monotonic() - start, log)
        with lock:
            if status == 0:
                ledger.add(step.name, time.monotonic() - start)
            else:
                left_over.add(step.name)

    def work_on(gpu: str | None, cores: set[int] | None = None) -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)  # this thread's, and that of what it starts
        while (step := line.take()) is not None:
            try:
                carry_out_one(step, gpu)
            finally:
                line.end(step)  # or who waits for it would wait for ever

    if not gpus:
        work_on(None)  # in this thread, so that an interrupt reaches the step as one
    else:
        with ThreadPoolExecutor(len(gpus)) as pool:
            try:
                parts = [share_of_cores(n, len(gpus)) for n in range(len(gpus))]
                for future in [pool.submit(work_on, *both) for both in zip(gpus, parts, strict=True)]:
                    future.result()
            finally:
                stop.set()  # an interrupt ends what runs, and nothing else begins
    return [s.name for s in asked if s.name in left_over]


def tell(step: Step, status: int | None, seconds: float, log: Path) -> None:
    outcome = "out of time" if status is None else "done" if status == 0 else f"ended with {status}"
    print(f"{step.name}: {outcome} after {seconds:.0f} s; {log}", flush=True)
    for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
        print(f"    {line[:160]}", flush=True)


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
            print(f"{step.group:9} {step.name:18} {step.seconds:4.0f} s  python {' '.join(argv(step, args.work)[1:])}")
        return 0
    if args.publish:
        for path in publish(args.work / "tables", PACKAGE_TABLES):
            print(f"wrote {path}")
        return 0
    if args.forget:
        shutil.rmtree(args.work, ignore_errors=True)
        return 0
    gpus = [g for g in args.gpus.split(",") if g]
    if not all(g.isdigit() for g in gpus) or len(set(gpus)) < len(gpus):
        raise UsageError(f"--gpus is {args.gpus!r}: expected numbers of GPUs, as 0,1,2,3")
    for gpu in gpus or ["0"]:
        attached_gpu(int(gpu))
    left_over = carry_out(steps, args.work, args.budget, again=bool(args.only), gpus=gpus)
    if left_over:
        print(f"not done: {', '.join(left_over)}")
    return 1 if left_over else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--budget", type=float, default=3600.0, metavar="S", help="seconds for all (3600)")
    made.add_argument("--only", default="", metavar="LIST", help="steps or groups, done before or not")
    made.add_argument("--gpus", default="", metavar="LIST", help="GPUs that share the steps (one step at a time)")
    made.add_argument("--work", type=Path, default=Path("build/release"), help="logs, tables, what is done")
    made.add_argument("--list", action="store_true", help="print the steps and run nothing")
    made.add_argument("--publish", action="store_true", help="copy the new tables into the package and run nothing")
    made.add_argument("--forget", action="store_true", help="remove --work and run nothing")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
