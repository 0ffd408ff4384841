"""The verb ``report``: tables for people, on the terminal or as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option, ensure_file
from tuner.cli.output import console
from tuner.cli.tables import table_paths, tables_argument


@click.command("report", context_settings=CONTEXT_SETTINGS)
@tables_argument
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one page with plots instead; it needs no network.",
)
@debug_option
def command(tables: tuple[Path, ...], html: Path | None) -> None:
    """Show dispatch TABLES (files or folders): every bucket's winner against the baselines."""
    from tuner.table import read

    found = [read(path, cubins=False) for path in table_paths(tables)]
    if html is not None:
        from tuner.report.html import page

        ensure_file(html)
        html.write_text(page(found), encoding="utf-8")
        click.echo(f"{html}: {len(found)} tables")
        return
    from tuner.report import terminal

    out = console()
    for table in found:
        out.print(terminal.winners(table))
        out.print(terminal.kernels(table))
        for line in terminal.summary(table):
            out.print(line)
