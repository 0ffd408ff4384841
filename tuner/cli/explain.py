"""The verb ``explain``: why this kernel for this batch and context."""

from __future__ import annotations

from pathlib import Path

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option
from tuner.cli.tables import table_paths, tables_argument
from tuner.errors import UsageError


@click.command("explain", context_settings=CONTEXT_SETTINGS)
@tables_argument
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Requests decoded together.")
@click.option(
    "--context", type=int, metavar="N", help="Tokens of the longest request.  [default: any, as in a CUDA graph]"
)
@click.option("--kv-heads", type=int, metavar="N", help="KV heads on this GPU.  [default: as tuned]")
@click.option(
    "--ragged", is_flag=True, help="The longest request has at least twice the tokens of the mean, or nobody knows."
)
@debug_option
def command(tables: tuple[Path, ...], batch: int, context: int | None, kv_heads: int | None, ragged: bool) -> None:
    """Say which kernel each of TABLES picks for a batch and context, and why.

    Tells the memory limit, the share of it that is reached, the bottleneck, the baselines and the runner-up.

    Example: python tune.py explain --batch 8 --context 32768
    """
    from tuner.table import explain, read

    for option, value in (("--batch", batch), ("--context", context), ("--kv-heads", kv_heads)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}: expected at least 1")
    for path in table_paths(tables):
        click.echo(path.name)
        explanation = explain(read(path), batch, context, kv_heads=kv_heads, ragged=ragged)
        for line in explanation.lines:
            click.echo(f"  {line}")
