"""The verb ``tune``: search, race, write the dispatch table, show winners against baselines."""

from __future__ import annotations

from collections.abc import Sequence
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
    tensor_parallel_option,
)
from tuner.cli.output import console
from tuner.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.search import TuneRequest, TuneResult
    from tuner.space.core import Value
    from tuner.workload import Workload

MAX_TRIALS = 100_000
MAX_WORKERS = 1024
MAX_SECONDS = 7 * 86400


@click.command("tune", context_settings=CONTEXT_SETTINGS)
@problem_options
@tensor_parallel_option
@click.option(
    "--warps",
    type=INT_LIST,
    metavar="LIST",
    help="Warps per CTA to try. Several, as 1,2,4, are compared over a few buckets and no table is written (but for op "
    "store); by default 16 kernels of each, 90 s of search, 30 s of races.",
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
@click.option(
    "--race-timeout",
    type=float,
    metavar="SECONDS",
    help="End what follows it after this long: Triton's constants, races of the best kernels with each other, and with "
    "the baselines, of which the first may take 20 s however little is left.  [default: 75]",
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
@click.option(
    "--recordings",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Also write all trials there, as JSON: every kernel's time on every bucket.",
)
@debug_option
def command(
    head_dim: int | None, model: str | None, gqa: int | None, kv_heads: int | None, ranks: int, **options: Any
) -> None:
    """Tune CUDA kernels for decode attention over a compressed KV cache, and write the dispatch table.

    On the attached GPU kernels are compiled, checked and timed. Without one, or with --arch of another GPU, they
    are compiled for that target and their times predicted by a static model; every line says which it was.
    """
    workload = read_workload(head_dim, model, gqa, kv_heads).shard(ranks)
    recordings: Path | None = options.pop("recordings")
    requests = read_requests(workload, **options)
    helpers = (options["gpus"] or ())[1:]
    output: Path = options["output"]
    if recordings is not None and compares(options["op"], options["warps"]):
        raise UsageError("--recordings is given with several --warps: expected one at most, a comparison keeps its own")
    for folder in (output, *([recordings] if recordings else [])):
        ensure_writable(folder)

    from tuner import toolchain
    from tuner.report import terminal
    from tuner.search import export_study

    toolchain.find({request.target.arch for request in requests})
    toolchain.find_gxx()
    out = console()
    results: list[TuneResult] = []
    comparisons: list[Path] = []
    for shape, layers in workload.shapes:
        if shape.wants:
            note = f"head dim {shape.head_dim}: {layers} layers with {shape.wants} keep vLLM's own kernel, not tuned"
            out.print(note)
    for request in requests:
        out.print(terminal.heading(request))
        if compares(request.problem.op, request.restrict.get("warps")):
            comparisons.append(_compare_layouts(out, request))
            continue
        result = _search(out, request, helpers)
        if recordings is not None:
            export_study(request, recordings / f"{result.study_name}.json", result.study_name)
        out.print(terminal.winners(result.table))
        out.print(terminal.kernels(result.table))
        for line in terminal.summary(result.table):
            out.print(line)
        results.append(result)
    for result in results:
        # Paths are for copying: never wrapped.
        out.print(f"dispatch table: {result.path}", soft_wrap=True)
    for path in comparisons:
        out.print(f"comparison: {path}", soft_wrap=True)


def compares(op: str, warps: Sequence[Value] | None) -> bool:
    """Whether warp counts are asked to be compared, rather than a table made."""
    return len(warps or ()) > 1 and op != "store"


def read_requests(
    workload: Workload,
    *,
    op: str,
    cache_format: str,
    arch: str | None,
    warps: tuple[int, ...] | None,
    trials: int | None,
    timeout: float | None,
    race_timeout: float | None,
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
    for option, seconds in (("--timeout", timeout), ("--race-timeout", race_timeout)):
        if seconds is not None and not 0 < seconds <= MAX_SECONDS:
            raise UsageError(f"{option} is {seconds:g}: expected more than 0 seconds, and at most a week")
    get_format(cache_format)
    shapes = problems_of(workload, op, cache_format)
    restrict = {"warps": warps} if warps else {}
    if compares(op, warps) and len(gpus or ()) > 1:
        raise UsageError("a comparison of warp counts runs on one GPU: expected one number after --gpus")
    for problem in shapes:
        get_space(problem.op).restricted(restrict)
    devices = gpus or (0,)
    target, evidence = read_target(arch, devices[0])  # last, because it loads torch
    if gpus:
        expect_attached(target.arch, gpus)

    from tuner.search import TuneRequest
    from tuner.search.predicted import OPS
    from tuner.workload import store_buckets

    if evidence == "predicted" and op not in OPS:
        known = " and ".join(OPS)
        raise UsageError(f"the static model knows {known} only: attach a {target.device_name} to tune {op}")
    return [
        TuneRequest(
            problem=problem,
            shape=shape,
            buckets=store_buckets() if op == "store" else workload.buckets,
            target=target,
            evidence=evidence,
            trials=trials,
            timeout_s=timeout,
            race_timeout_s=race_timeout,
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
    from tuner.search import DEFAULT_RACE_TIMEOUT_S, DEFAULT_TIMEOUT_S, tune

    search_s = request.timeout_s or DEFAULT_TIMEOUT_S[request.evidence]
    race_s = request.race_timeout_s or DEFAULT_RACE_TIMEOUT_S
    out.print(f"at most {search_s:g} s of search, then about {race_s:g} s of races with each other and the baselines")
    with ProgressView(out) as view, Helpers(request, more_gpus) as helpers:

        def on_event(event: Any) -> None:
            helpers.start(search_s - event.progress.elapsed_s)
            view(event)

        return tune(request, on_event)


def _compare_layouts(out: Console, request: TuneRequest) -> Path:
    """One study with an equal share for each warp count, one race of the best of each; prints and keeps the outcome."""
    from tuner.cli.progress import ProgressView
    from tuner.report import terminal
    from tuner.report.layouts import layout_rows
    from tuner.search import compare as comparing

    request = replace(request, buckets=comparing.comparison_buckets(request.problem.op))
    search_s = request.timeout_s or comparing.DEFAULT_TIMEOUT_S
    race_s = request.race_timeout_s or comparing.DEFAULT_RACE_TIMEOUT_S
    out.print(f"at most {search_s:g} s of search, the same for each warp count, then about {race_s:g} s of races")
    with ProgressView(out) as view:
        comparison = comparing.compare(request, "warps", view)
    rows = layout_rows(comparison)
    out.print(terminal.layouts(rows, comparison))
    out.print(terminal.layout_times(rows, comparison))
    for row in rows:
        out.print(f"{row.warps} warps: {row.params}", soft_wrap=True)
    for value, why in comparison.missing.items():
        out.print(f"{value} warps: {why}", soft_wrap=True)
    return comparison.save(request.root / "comparisons")
