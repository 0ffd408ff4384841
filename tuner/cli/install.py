"""The verb ``install``: tables and cubins to where vLLM finds them, and out of there again."""

from __future__ import annotations

from pathlib import Path

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option, ensure_writable
from tuner.cli.tables import table_paths, tables_argument


@click.command("install", context_settings=CONTEXT_SETTINGS)
@tables_argument
@click.option("--dry-run", is_flag=True, help="Say what would be done and do nothing.")
@click.option("--uninstall", is_flag=True, help="Remove what was installed.")
@click.option("--allow-predicted", is_flag=True, help="Install tables whose times were never measured, too.")
@debug_option
def command(tables: tuple[Path, ...], dry_run: bool, uninstall: bool, allow_predicted: bool) -> None:
    """Put dispatch TABLES (files or folders; without any: build/tables) and their cubins where vLLM finds them.

    That is $VLLM_TUNED_CONFIG_FOLDER if it is set, else the folder "tuned" of vLLM's configuration directory
    (~/.config/vllm). A table that is already there is merged: its buckets stay unless the new table has them too.
    """
    from tuner.table import install

    folder = install.install_folder()
    if uninstall:
        _uninstall(folder, dry_run)
        return
    steps = install.plan(table_paths(tables), folder, allow_predicted=allow_predicted)
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


def _uninstall(folder: Path, dry_run: bool) -> None:
    from tuner.table import install

    paths = install.installed(folder) if dry_run else install.uninstall(folder)
    for path in paths:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    if not paths:
        click.echo(f"nothing of ours in {folder}")
