"""Every kernel of the tables under compute-sanitizer: memcheck and racecheck over the gate's smallest cases.

    python benchmarks/sanitize.py --tables build/tables                  # all that are for the attached GPU
    python benchmarks/sanitize.py --tools memcheck --timeout 300         # what fits; without --tables: the package's

One line per kernel and tool, and the first report where it found something. Kernels of a table share a process, since
starting one takes longest, and where a tool reports anything each gets its own; --jobs processes at a time, whose whole
output is kept in --work. So is what was clean (clean.jsonl): the same command goes on with the rest and what was not.

Before that racecheck is asked about a small program, sanitize_control.cu, with races and without. It must tell them
apart. Some of what kernels do it cannot be relied on to follow (sanitize_twin.py says what), so they are judged by
twins, the same text but for that: what it says of a twin counts for the kernel, if it can tell races of twins in the
small program. If it cannot, or where there is no twin, they are called unsure and counted by themselves. What that
line says that it does not see `python benchmarks/races.py` looks for in the emulator.
Ends with 1 where a tool reports anything else, or where a kernel was left out for want of time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import attached_gpu, ended, run_bounded  # noqa: E402
from benchmarks.sanitize_twin import TwinKernel, needs_twin, twin  # noqa: E402
from tuner import toolchain  # noqa: E402
from tuner.build import BuildFailure, build  # noqa: E402
from tuner.errors import TunerError, UsageError  # noqa: E402
from tuner.render import Source, environment, render, template_folder  # noqa: E402
from tuner.space import Problem, default_config  # noqa: E402
from tuner.standalone.kernels import shared_primitives  # noqa: E402
from tuner.table import Kernel, Table, read, read_cubin  # noqa: E402
from tuner.table.install import TABLE_PATTERN  # noqa: E402
from tuner.table.store import PACKAGE_TABLES  # noqa: E402

TOOLS = ("memcheck", "racecheck")
CLEAN, UNSURE, FOUND = "clean", "unsure", "FOUND"
_FOUND = 9
"""Exit status of compute-sanitizer where it reports something."""
_TOGETHER = 5
"""Kernels that a process takes."""
_CONTROL = Path(__file__).resolve().parent / "sanitize_control.cu"
_CONTROL_S = 60.0
_CUDA_BARRIERS = "256"
"""mbarriers of a CTA that racecheck makes room for: by itself for those in the source, where one line opens many."""
_OVERFLOW = "overflow of tracked cuda::barrier"
"""In a warning of racecheck, after which its results mean nothing."""
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
_REPORT = re.compile(r"^=+ +((?:Error|Warning|Invalid|Race|Potential|Program|Process)\b.*(?:\n=+ {2,}\S.*){0,2})", re.M)
"""A tool's first lines on something that it found."""


@dataclass(frozen=True)
class Subject:
    """A kernel, and where its cubin is, or its twin's."""

    table: Table
    kernel: Kernel
    cubin: Path
    twin: str = ""
    """Digest of the twin's source."""

    @property
    def needs_twin(self) -> bool:
        return needs_twin(self.kernel.config(self.table.problem))

    @property
    def key(self) -> str:
        """What tells its cubin from all others: a twin's own bytes depend on where it was compiled."""
        return f"{self.kernel.id} {self.twin}".strip()

    @property
    def name(self) -> str:
        p = self.table.problem
        return f"{p.op} D={p.head_dim} group {p.gqa} {p.cache_format} {self.kernel.id}{' (twin)' if self.twin else ''}"


class Judged:
    """What was clean, in a JSON-lines file that outlives an interrupt, by tool, cubin and version of the sanitizer."""

    def __init__(self, path: Path, version: str) -> None:
        self._path, self._version, self._lock = path, version, threading.Lock()
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        self._clean = set(lines)
        if lines and not lines[-1].endswith("\n"):  # it was being written when the last run ended
            path.write_text("".join(lines[:-1]))

    def is_clean(self, tool: str, subject: Subject) -> bool:
        return self._line(tool, subject) in self._clean

    def add(self, tool: str, subject: Subject) -> None:
        with self._lock, self._path.open("a") as file:
            file.write(self._line(tool, subject))

    def _line(self, tool: str, subject: Subject) -> str:
        return json.dumps({"tool": tool, "cubin": subject.key, "version": self._version}) + "\n"


def subjects(folder: Path, arch: str) -> Iterator[Subject]:
    """The kernels of every table in ``folder`` that is for ``arch``. Raises TableError for a broken table."""
    for path in sorted(folder.glob(TABLE_PATTERN)):
        table = read(path)
        for kernel in table.kernels if table.device.arch == arch else ():
            read_cubin(path, table, kernel.id)
            yield Subject(table, kernel, path.parent / "kernels" / f"{kernel.id}.cubin")


def with_twins(found: Sequence[Subject], arch: str, work: Path) -> list[Subject]:
    """``found`` with a twin in the place of each kernel that needs one. Where there is none the kernel stays, and a
    line says why: it does not compile, the kernel's text is not as expected, or it was made from other templates than
    its twin would be.
    """
    sources = {s.kernel.id: source for s in found if s.needs_twin and (source := _twin_source(s))}
    results = build(sources.values(), [arch], root=work / "twins")
    made = []
    for subject in found:
        source = sources.get(subject.kernel.id)
        result = results[source.digest, arch] if source else None
        if isinstance(result, BuildFailure):
            print(f"no twin of {subject.name}: it does not compile: {result.message}; see {result.log}")
            result = None
        made.append(replace(subject, cubin=result.cubin, twin=source.digest) if source and result else subject)
    return made


def _twin_source(subject: Subject) -> Source | None:
    config = subject.kernel.config(subject.table.problem)
    if render(config).digest == subject.kernel.source_digest:
        try:
            return twin(config)
        except TunerError as error:
            print(error)
            return None
    print(f"no twin of {subject.name}: it was made from other templates than these")
    return None


def groups(found: Iterable[Subject]) -> Iterator[list[Subject]]:
    """``found`` in runs of one table, of at most _TOGETHER."""
    for _, run in itertools.groupby(found, key=lambda s: s.table.file_name):
        rest = list(run)
        yield from (rest[i : i + _TOGETHER] for i in range(0, len(rest), _TOGETHER))


def command(tool: str, sanitizer: str, group: Sequence[Subject]) -> list[str]:
    """Runs the gate on every kernel of ``group`` under ``tool``."""
    words = []
    for subject in group:
        config = json.dumps(subject.kernel.config(subject.table.problem).to_dict())
        kind = "twin" if subject.twin else "kernel"
        words += [kind, config, str(subject.cubin), str(subject.table.kv_heads)]
    child = [sys.executable, str(Path(__file__).resolve()), "--child", *words]
    return [*examiner(tool, sanitizer), *child]


def examiner(tool: str, sanitizer: str) -> list[str]:
    """The words before those of a command that ``tool`` is to examine."""
    room = ["--num-cuda-barriers", _CUDA_BARRIERS] if tool == "racecheck" else []
    return [sanitizer, "--tool", tool, *room, "--error-exitcode", str(_FOUND)]


def summary(text: str) -> str:
    """The tool's last word."""
    found = _SUMMARY.findall(text)
    return found[-1].strip() if found else "no summary"


def first_report(text: str) -> list[str]:
    """What a tool says of the first thing that it found, as indented lines; none where nothing looks like it."""
    found = _REPORT.search(text)
    return [f"    {line.lstrip('= ')}" for line in found[1].splitlines()] if found else []


def follows_twins(sanitizer: str, arch: str, work: Path) -> bool:
    """Whether racecheck tells right from wrong in the ways of twins. Raises TunerError where it cannot be asked, or
    cannot where only the whole CTA meets either.
    """
    nvcc = toolchain.find((arch,))
    program, written = work / "control", work / "control.log"
    work.mkdir(parents=True, exist_ok=True)
    (work / "primitives.cuh").write_text(_control_primitives())
    with written.open("w") as log:
        libraries = nvcc.nvcc.parents[1] / "lib"  # of a wheel, where its nvcc does not look
        options = ["-std=c++17", f"-arch={arch}", f"-I{work}", f"-L{libraries}", "-o", str(program)]
        if run_bounded([str(nvcc.nvcc), *options, str(_CONTROL)], log, _CONTROL_S, env=nvcc.env) != 0:
            raise TunerError(f"{_CONTROL.name} does not compile: see {written}")

        def reports(what: str, race: int) -> bool | None:
            """Whether anything is reported; None where racecheck or the program failed."""
            print(f"{what}, race {race}", file=log, flush=True)
            status = run_bounded([*examiner("racecheck", sanitizer), str(program), what, str(race)], log, _CONTROL_S)
            return {0: False, _FOUND: True}.get(status if status is not None else -1)

        def tells(what: str, races: int) -> bool:
            """Whether each race is reported, and nothing where there is none."""
            return all(reports(what, race) is (race > 0) for race in range(races + 1))

        if not tells("cta", 1):
            raise TunerError(f"racecheck does not tell races in {_CONTROL.name}, or could not run it: see {written}")
        found = tells("pairs", 3) and tells("turns", 1)
        said = [f"{'tells' if found else 'cannot tell'} races of twins"]
        if found:
            stored = {True: "those too", False: "but none", None: "not asked about those"}[reports("turns", 2)]
            said.append(f"{stored} in what a cluster's CTAs store in each other's shared memory")
            if (own := reports("lanes", 0)) is not False:
                said.append(f"{'reports some' if own else 'could not be asked'} where kernels' own ways have none")
    print(f"control: racecheck {', '.join(said)}")
    return found


def _control_primitives() -> str:
    """What the small program shares with kernels."""
    parts = environment(template_folder().resolve())
    some = [parts.get_template(f"parts/ptx_{name}.cuh.j2").render() for name in ("prompt", "push")]
    return "".join([shared_primitives(default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))), *some])


def gate(words: Sequence[str]) -> int:
    """The child: the gate's smallest cases, on the GPU, for each (kind, config, cubin, KV heads) of ``words``."""
    from tuner.launch import LoadedKernel
    from tuner.measure.child import Child
    from tuner.measure.parent import end_with_parent

    end_with_parent()
    child, failed = Child(0, 16, None, 0), 0
    for kind, config, cubin, kv_heads in zip(*[iter(words)] * 4, strict=True):
        child.loads = TwinKernel if kind == "twin" else LoadedKernel
        request = {"config": json.loads(config), "cubin": cubin, "level": "tiny", "kv_heads": int(kv_heads)}
        answer = child.check(request)
        print(answer, flush=True)
        failed += not isinstance(answer, dict)
    return 1 if failed else 0


def run(args: argparse.Namespace) -> int:
    if args.child:
        return gate(args.child)
    tools = args.tools.split(",")
    unknown = [t for t in tools if t not in TOOLS]
    if unknown:
        raise UsageError(f"--tools names {unknown[0]!r}: expected some of {', '.join(TOOLS)}")
    begun, target = time.monotonic(), attached_gpu(0)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise TunerError("no compute-sanitizer on the PATH: it comes with the CUDA toolkit")
    twins = "racecheck" in tools and follows_twins(sanitizer, target.arch, args.work)
    kernels = list(subjects(args.tables, target.arch))
    raced = with_twins(kernels, target.arch, args.work) if twins else kernels
    judged = Judged(args.work / "clean.jsonl", version_of(sanitizer))
    every = {tool: raced if tool == "racecheck" else kernels for tool in tools}
    asked = open_questions(every, judged)
    left = args.timeout - (time.monotonic() - begun)
    found = examine_all(asked, sanitizer, args.work, args.jobs, left, judged)
    number, rest = sum(map(len, every.values())), sum(len(group) for group, _ in asked)
    counts = {word: found.count(word) for word in (CLEAN, UNSURE, FOUND)}
    counts[CLEAN] += number - rest
    said = ", ".join(f"{n} {word}" for word, n in counts.items())
    before = f" ({number - rest} of them before)" if number > rest else ""
    print(f"{said}{before}; {rest - len(found)} of {number} not run; logs in {args.work}")
    return 0 if counts[CLEAN] + counts[UNSURE] == number else 1


def open_questions(every: Mapping[str, Sequence[Subject]], judged: Judged) -> list[tuple[list[Subject], str]]:
    """Groups of what was not found clean before, each with its tool; what takes longest first: nothing waits for it
    alone."""
    parts = {tool: list(groups(s for s in some if not judged.is_clean(tool, s))) for tool, some in every.items()}
    turns = itertools.zip_longest(*parts.values())
    asked = [(group, tool) for turn in turns for group, tool in zip(turn, parts, strict=True) if group]
    return sorted(asked, key=lambda a: -a[0][0].table.problem.head_dim)


def version_of(sanitizer: str) -> str:
    """What compute-sanitizer says of itself."""
    told = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(told.split())


def examine_all(
    asked: Sequence[tuple[Sequence[Subject], str]],
    sanitizer: str,
    work: Path,
    jobs: int,
    timeout_s: float,
    judged: Judged,
) -> list[str]:
    """Of each kernel and tool that there was time for: CLEAN, FOUND or UNSURE; a line on each.

    UNSURE is what racecheck says of kernels that need a twin and have none, and of those whose mbarriers were too many
    for it.
    """
    work.mkdir(parents=True, exist_ok=True)
    deadline, stop = time.monotonic() + timeout_s, threading.Event()
    # Threads for the reference: one per core in every process is slower.
    cores = max(1, len(os.sched_getaffinity(0)) // jobs)
    env = {"OMP_NUM_THREADS": str(cores)} | os.environ

    def examine(group: Sequence[Subject], tool: str) -> list[str]:
        left = deadline - time.monotonic()
        if left <= 0 or stop.is_set():
            return []
        more = f"-and-{len(group) - 1}-more" if len(group) > 1 else ""
        log = work / f"{group[0].kernel.id}-{tool}{more}.log"
        with log.open("w") as file:
            status = run_bounded(command(tool, sanitizer, group), file, left, stop=stop, env=env)
        text = log.read_text()
        if len(group) > 1 and (status or _OVERFLOW in text):
            return [word for subject in group for word in examine([subject], tool)]
        if status is None:
            return []
        said = []
        for subject in group:
            untold = subject.needs_twin and not subject.twin
            nothing = tool == "racecheck" and (untold or _OVERFLOW in text)
            said.append(UNSURE if nothing and status in (0, _FOUND) else FOUND if status else CLEAN)
            if said[-1] == CLEAN:
                judged.add(tool, subject)
            lines = [f"{said[-1]} {tool:9} {subject.name}: {summary(text)}"]
            print("\n".join(lines + (first_report(text) if said[-1] == FOUND else [])), flush=True)
        return said

    pool = ThreadPoolExecutor(jobs)
    try:
        return [word for f in [pool.submit(examine, *a) for a in asked] for word in f.result()]
    finally:
        stop.set()  # an interrupt ends what runs, and nothing else begins
        pool.shutdown(cancel_futures=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tables", type=Path, default=PACKAGE_TABLES, help="folder of tables (the package's)")
    made.add_argument("--tools", default=",".join(TOOLS), help=f"list (default: {','.join(TOOLS)})")
    made.add_argument("--timeout", type=float, default=600.0, help="seconds for all (600)")
    made.add_argument("--jobs", type=int, default=4, help="processes at a time (4)")
    made.add_argument("--work", type=Path, default=Path("build/sanitize"), help="where logs go")
    made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
