"""The verb ``install``: tables and cubins to where vLLM finds them, and out of there again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuner.cli.options import (
    CONTEXT_SETTINGS,
    DEFAULT_FORMAT,
    DEFAULT_OUTPUT,
    debug_option,
    ensure_writable,
    read_target,
    tensor_parallel_option,
)
from tuner.cli.tables import table_paths, tables_argument
from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.workload import Workload


@click.command("install", context_settings=CONTEXT_SETTINGS)
@tables_argument
@click.option("--dry-run", is_flag=True, help="Say what would be done and do nothing.")
@click.option("--uninstall", is_flag=True, help="Remove what was installed.")
@click.option("--allow-predicted", is_flag=True, help="Install tables whose times were never measured, too.")
@click.option("--model", metavar="NAME|PATH", help="Add default kernels for it, and say which layers use which kernel.")
@click.option(
    "--kv-cache-dtype", "cache_format", default=DEFAULT_FORMAT, show_default=True, metavar="FORMAT", help="For --model."
)
@tensor_parallel_option
@debug_option
def command(
    tables: tuple[Path, ...],
    dry_run: bool,
    uninstall: bool,
    allow_predicted: bool,
    model: str | None,
    cache_format: str,
    ranks: int,
) -> None:
    """Put dispatch TABLES (files or folders; without any: build/tables) and their cubins where vLLM finds them.

    That is $VLLM_TUNED_CONFIG_FOLDER if it is set, else the folder "tuned" of vLLM's configuration directory
    (~/.config/vllm). A table that is already there is merged: its buckets stay unless the new table has them too.
    The tables that come with this package are found without being installed.
    """
    from tuner.formats import get_format
    from tuner.table import install
    from tuner.workload import load_model

    # A wrong name is told before anything is written.
    workload = None if model is None else load_model(model).shard(ranks)
    get_format(cache_format)
    folder = install.install_folder()
    if uninstall:
        if tables or workload is not None:
            raise UsageError("--uninstall takes out all that was installed: expected no tables and no --model")
        _uninstall(folder, dry_run)
        return
    steps = install.plan(_paths(tables, workload is not None), folder, allow_predicted=allow_predicted)
    if not dry_run:
        ensure_writable(folder)
        install.carry_out(steps)
    for step in steps:
        verb = (
            ("would merge into" if dry_run else "merged into")
            if step.merged
            else ("would write" if dry_run else "wrote")
        )
        click.echo(f"{verb} {step.path} ({step.table.evidence}, {len(step.table.kernels)} kernels)")
    if workload is not None:
        _model(workload, cache_format, folder, dry_run)


def _paths(tables: tuple[Path, ...], default_kernels: bool) -> list[Path]:
    """What to install; nothing where there are only shipped tables and ``default_kernels`` are to be installed."""
    from tuner.table.install import TABLE_PATTERN

    if tables or any(DEFAULT_OUTPUT.glob(TABLE_PATTERN)):
        return table_paths(tables)
    nothing = f"no tables of your own in {DEFAULT_OUTPUT}: vLLM finds the shipped ones without being told"
    if not default_kernels:
        raise UsageError(f"{nothing}; tune first, name tables, or add --model for default kernels")
    click.echo(nothing)
    return []


def _model(workload: Workload, cache_format: str, folder: Path, dry_run: bool) -> None:
    """Default kernels of the model's layers where there is a compiler, then what vLLM will run for each of them."""
    from tuner.errors import TunerError
    from tuner.vllm.defaults import build_defaults, write
    from tuner.vllm.eligible import LayerFacts, objection
    from tuner.vllm.forecast import forecast

    target, _ = read_target(None)
    layers = [
        LayerFacts(s.head_dim, s.q_heads, s.kv_heads, cache_format, 1.0) for s, _ in workload.shapes if not s.wants
    ]
    problems = list(dict.fromkeys(layer.problem for layer in layers if objection(layer) is None))
    if not dry_run:
        try:
            for made in build_defaults(problems, target.arch):
                click.echo(f"wrote {write(made, folder)} ({len(made.kernels)} default kernels)")
        except TunerError as error:
            click.echo(f"no default kernels: {error}")
    now = "; as it is now, before installing" if dry_run else ""
    click.echo(f"{workload.name} with --kv-cache-dtype {cache_format} on {target.device_name}{now}:")
    for line in forecast(workload, cache_format, target):
        click.echo(f"  {line}")


def _uninstall(folder: Path, dry_run: bool) -> None:
    from tuner.table import install

    paths = install.installed(folder) if dry_run else install.uninstall(folder)
    for path in paths:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    if not paths:
        click.echo(f"nothing of ours in {folder}")
