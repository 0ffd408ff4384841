"""The verb ``bench``: attention time of a decode step over all layers of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuner.cli.options import CONTEXT_SETTINGS, DEFAULT_FORMAT, INT_LIST, debug_option
from tuner.cli.output import console
from tuner.errors import TunerError, UsageError

if TYPE_CHECKING:
    from tuner.targets import Target


@click.command("bench", context_settings=CONTEXT_SETTINGS)
@click.option("--model", required=True, metavar="NAME|PATH", help="Preset, or a Hugging Face config.json.")
@click.option(
    "--kv-cache-dtype",
    "cache_format",
    default=DEFAULT_FORMAT,
    show_default=True,
    metavar="FORMAT",
    help="Format of the compressed cache.",
)
@click.option(
    "--concurrency",
    type=INT_LIST,
    default=(1, 2, 4),
    show_default="1,2,4",
    metavar="LIST",
    help="Requests decoded together.",
)
@click.option("--context", type=int, default=32768, show_default=True, metavar="N", help="Tokens of each request.")
@click.option("--gpu", type=int, default=0, show_default=True, metavar="N", help="Which GPU.")
@click.option(
    "--budget", type=float, default=5.0, show_default=True, metavar="SECONDS", help="Time for each comparison."
)
@debug_option
def command(model: str, cache_format: str, concurrency: tuple[int, ...], context: int, gpu: int, budget: float) -> None:
    """Time attention over all layers of a model on the attached GPU, against Triton and uncompressed attention.

    Contestants run in shuffled, interleaved rounds, each call from a CUDA graph with a cold L2. The kernels are those
    of the tables that ``install`` or the package put in place, else the default configuration. What is timed is
    attention only: how much of a step that is depends on the rest of the model, which is not run.

    Example: python tune.py bench --model qwen3.5-122b --concurrency 1,2,4
    """
    from tuner.formats import get_format
    from tuner.report import terminal
    from tuner.targets import attached
    from tuner.workload import load_model

    get_format(cache_format)
    for value in (*concurrency, context):
        if value < 1:
            raise UsageError(f"--concurrency and --context count requests and tokens, at least 1: not {value}")
    workload = load_model(model)
    target = attached(gpu)
    if target is None:
        raise TunerError(f"bench times kernels on a GPU, and GPU {gpu} is not attached: doctor says what is missing")

    from tuner.bench import bench_model

    rows = bench_model(
        workload, cache_format, concurrency, context, target, gpu=gpu, budget_s=budget, root=Path("build")
    )
    console().print(terminal.steps(workload.name, _where(target), rows))


def _where(target: Target) -> str:
    return f"{target.device_name} ({target.arch})"
