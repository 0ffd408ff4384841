"""The verb ``bench``: attention time of a decode step over all layers of a model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tuner.cli.options import (
    CONTEXT_SETTINGS,
    DEFAULT_FORMAT,
    INT_LIST,
    SHARE_LIST,
    debug_option,
    ensure_file,
    tensor_parallel_option,
)
from tuner.cli.output import console
from tuner.errors import TunerError, UsageError

ASSUMED_SHARES = (0.1, 0.2, 0.4)
"""Shares of a step with bf16 that attention might take: examples, since the rest of a step is not run."""


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
    metavar="LIST",
    help="Requests decoded together.  [default: 1,2,4]",
)
@click.option(
    "--context",
    "contexts",
    type=INT_LIST,
    default=(4096, 32768, 131072),
    metavar="LIST",
    help="Tokens of each request.  [default: 4096,32768,131072]",
)
@click.option(
    "--attention-share",
    "attention_shares",
    type=SHARE_LIST,
    default=ASSUMED_SHARES,
    metavar="LIST",
    help="Shares of a step with bf16 (0 to 1) that attention is assumed to take: a second table says what each makes "
    "of a step.  [default: 0.1,0.2,0.4]",
)
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Also write the times there.")
@click.option("--gpu", type=int, default=0, show_default=True, metavar="N", help="Which GPU.")
@click.option(
    "--budget", type=float, default=50.0, show_default=True, metavar="SECONDS", help="Time for all comparisons."
)
@tensor_parallel_option
@debug_option
def command(
    model: str,
    ranks: int,
    cache_format: str,
    concurrency: tuple[int, ...],
    contexts: tuple[int, ...],
    attention_shares: tuple[float, ...],
    path: Path | None,
    gpu: int,
    budget: float,
) -> None:
    """Time attention over all layers of a model on the attached GPU, against three other ways to attend.

    bf16: the fastest attention at hand on an uncompressed cache. Seed's path: wph_dequant of the whole cache, then the
    same bf16 attention. Triton: vLLM's kernel or ours of the same structure, as shipped. WPH: the fused kernel, of the
    tables that ``install`` or the package put in place, else in its default configuration. Contestants run in shuffled,
    interleaved rounds, each call from a CUDA graph with a cold L2.

    What is timed is attention only. How much of a step that is depends on the rest of the model, which is not run. So
    a second table says how long a step takes, as a multiple of one with bf16, for assumed shares: examples by default,
    or those of --attention-share.

    Example: python tune.py bench --model qwen3.5-122b --concurrency 1,2,4
    """
    from tuner.formats import get_format
    from tuner.report import terminal
    from tuner.targets import attached
    from tuner.workload import load_model

    get_format(cache_format)
    for value in (*concurrency, *contexts):
        if value < 1:
            raise UsageError(f"--concurrency and --context count requests and tokens, at least 1: not {value}")
    for share in attention_shares:
        if not 0 < share <= 1:
            raise UsageError(f"--attention-share is {share}: expected shares above 0 and at most 1")
    if not 0 < budget < 86400:
        raise UsageError(f"--budget is {budget}: expected seconds, above 0 and less than a day")
    workload = load_model(model).shard(ranks)
    if path is not None:
        ensure_file(path)
    target = attached(gpu)
    if target is None:
        raise TunerError(f"bench times kernels on a GPU, and GPU {gpu} is not attached: doctor says what is missing")

    from tuner.bench import bench_model, to_json

    rows = bench_model(
        workload,
        cache_format,
        concurrency,
        contexts,
        target,
        gpu=gpu,
        budget_s=budget,
        root=Path("build"),
        tell=lambda line: click.echo(line, err=True),
    )
    if path is not None:
        path.write_text(json.dumps(to_json(workload, cache_format, target, rows, attention_shares), indent=1) + "\n")
    out = console()
    out.print(terminal.steps(workload.name, f"{target.device_name} ({target.arch})", rows))
    out.print(terminal.assumed_steps(rows, attention_shares))
    for name, reason in sorted({item for row in rows for item in row.missing.items()}):
        out.print(f"{name}: not timed: {reason}")
