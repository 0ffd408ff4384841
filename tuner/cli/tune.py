"""The verb ``tune``: search, race, write the dispatch table, show winners against baselines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuner.cli.options import (
    CONTEXT_SETTINGS,
    DEFAULT_OUTPUT,
    INT_LIST,
    debug_option,
    ensure_writable,
    problem_options,
    problems_of,
    read_target,
    read_workload,
)
from tuner.cli.output import console
from tuner.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.search import TuneRequest, TuneResult
    from tuner.workload import Workload

MAX_TRIALS = 100_000
MAX_WORKERS = 1024
LEAST_TRIALS_PER_LAYOUT = 4
"""Two of a study's trials are the default and the seed's configuration, whatever their warp count."""


@click.command("tune", context_settings=CONTEXT_SETTINGS)
@problem_options
@click.option(
    "--warps",
    type=INT_LIST,
    metavar="LIST",
    help="Warps per CTA to try, for example 1,2,4. With --op dequant each gets its own search and they are compared.",
)
@click.option(
    "--trials", type=int, metavar="N", help="Kernels to try per table.  [default: 160 measured, 96 predicted]"
)
@click.option(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help="End the search of a table after this long.  [default: 360 measured, 180 predicted]",
)
@click.option("--workers", type=int, metavar="N", help="Compilations at a time.  [default: one per core]")
@click.option("--gpus", type=INT_LIST, metavar="LIST", help="GPUs that share the search.  [default: 0]")
@click.option(
    "--storage",
    metavar="URL",
    help="Optuna storage; hosts that name the same one share the search.  [default: SQLite under build/]",
)
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on with an earlier search of the same problem."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the search.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=DEFAULT_OUTPUT,
    show_default=True,
    metavar="FOLDER",
    help="Where tables and cubins go.",
)
@debug_option
def command(head_dim: int | None, model: str | None, gqa: int | None, **options: Any) -> None:
    """Tune CUDA kernels for decode attention over a compressed KV cache, and write the dispatch table.

    On the attached GPU kernels are compiled, checked and timed. Without one, or with --arch of another GPU, they
    are compiled for that target and their times predicted by a static model; every line says which it was.
    """
    workload = read_workload(head_dim, model, gqa)
    requests = read_requests(workload, **options)
    helpers = (options["gpus"] or ())[1:]
    output: Path = options["output"]
    ensure_writable(output)

    from tuner import toolchain
    from tuner.report import terminal

    toolchain.find()
    out = console()
    results = []
    for shape, layers in workload.shapes:
        if shape.sliding:
            note = f"head dim {shape.head_dim}: {layers} layers with a sliding window keep vLLM's own kernel, not tuned"
            out.print(note)
    for request in requests:
        out.print(terminal.heading(request))
        if request.problem.op == "dequant" and len(options["warps"] or ()) > 1:
            result = _compare_layouts(out, request, helpers)
        else:
            result = _search(out, request, helpers)
        out.print(terminal.winners(result.table))
        out.print(terminal.kernels(result.table))
        for line in terminal.summary(result.table):
            out.print(line)
        results.append(result)
    for result in results:
        # Paths are for copying: never wrapped.
        out.print(f"dispatch table: {result.path}", soft_wrap=True)


def read_requests(
    workload: Workload,
    *,
    op: str,
    cache_format: str,
    arch: str | None,
    warps: tuple[int, ...] | None,
    trials: int | None,
    timeout: float | None,
    workers: int | None,
    gpus: tuple[int, ...] | None,
    storage: str | None,
    resume: bool,
    seed: int,
    output: Path | None,
) -> list[TuneRequest]:
    """One request per distinct problem of ``workload``, all checked before anything is built. Raises UsageError."""
    from tuner.cli.helpers import expect_attached
    from tuner.formats import get_format
    from tuner.space import get_space

    _expect("--trials", trials, 1, MAX_TRIALS)
    _expect("--workers", workers, 1, MAX_WORKERS)
    _expect("--seed", seed, 0, 2**32 - 1)
    if timeout is not None and not timeout > 0:
        raise UsageError(f"--timeout is {timeout:g}: expected more than 0 seconds")
    get_format(cache_format)
    if op == "store":
        raise UsageError("--op store is not searched, its default configuration runs: expected decode or dequant")
    shapes = problems_of(workload, op, cache_format)
    restrict = {"warps": warps} if warps else {}
    if op == "dequant" and len(warps or ()) > 1 and not resume:
        raise UsageError("--no-resume does not go with a comparison of warp counts: another --seed starts a new one")
    for problem in shapes:
        get_space(problem.op).restricted(restrict)
    devices = gpus or (0,)
    target, evidence = read_target(arch, devices[0])  # last, because it loads torch
    if gpus:
        expect_attached(target.arch, gpus)

    from tuner.search import TuneRequest

    return [
        TuneRequest(
            problem=problem,
            shape=shape,
            buckets=workload.buckets,
            target=target,
            evidence=evidence,
            trials=trials,
            timeout_s=timeout,
            seed=seed,
            storage=storage,
            resume=resume,
            workers=workers,
            output=output,
            restrict=restrict,
            device=devices[0],
        )
        for problem, shape in shapes.items()
    ]


def _expect(option: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{option} is {value}: expected {low} to {high}")


def _search(out: Console, request: TuneRequest, more_gpus: tuple[int, ...]) -> TuneResult:
    from tuner.cli.helpers import Helpers
    from tuner.cli.progress import ProgressView
    from tuner.search import tune

    with ProgressView(out) as view, Helpers(request, more_gpus) as helpers:

        def on_event(event: Any) -> None:
            helpers.start()
            view(event)

        return tune(request, on_event)


def _compare_layouts(out: Console, request: TuneRequest, more_gpus: tuple[int, ...]) -> TuneResult:
    """A search per warp count with an equal share of the trials, then the table from all of them together."""
    import tempfile

    from tuner.baselines import BASELINES
    from tuner.report import terminal
    from tuner.report.layouts import layout_row
    from tuner.search import DEFAULT_TIMEOUT_S, DEFAULT_TRIALS, export_study, import_study

    counts = request.restrict["warps"]
    share = (request.trials or DEFAULT_TRIALS[request.evidence]) // len(counts)
    timeout_s = (request.timeout_s or DEFAULT_TIMEOUT_S[request.evidence]) / len(counts)
    rows = []
    for count in counts:
        part = replace(
            request,
            restrict={**request.restrict, "warps": (count,)},
            trials=max(LEAST_TRIALS_PER_LAYOUT, share),
            timeout_s=timeout_s,
            output=None,
            baselines=tuple(b.name for b in BASELINES.values() if b.op == request.problem.op),
        )
        out.print(f"{count} warps per CTA")
        rows.append(layout_row(int(count), _search(out, part, more_gpus).table, request.target))
        with tempfile.TemporaryDirectory() as folder:
            recording = Path(folder) / "trials.json"
            export_study(part, recording)
            import_study(request, recording)
            known = export_study(request, recording)
    out.print("all layouts together")
    result = _search(out, replace(request, trials=known), more_gpus)
    out.print(terminal.layouts(rows))
    return result
