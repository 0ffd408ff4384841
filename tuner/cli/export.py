"""The verb ``export``: tables, cubins and readable sources in one folder."""

from __future__ import annotations

from pathlib import Path

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option, ensure_writable
from tuner.cli.tables import table_paths, tables_argument


@click.command("export", context_settings=CONTEXT_SETTINGS)
@tables_argument
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("generated"),
    show_default=True,
    metavar="FOLDER",
    help="Where to copy to; one folder per target is made in it.",
)
@debug_option
def command(tables: tuple[Path, ...], folder: Path) -> None:
    """Copy TABLES with their cubins, and the CUDA source of every kernel as a person would read it.

    A source is rendered anew; where the templates have changed since, it is left out and a line says so.
    """
    from tuner.render import render
    from tuner.table import export, read

    paths = table_paths(tables)
    ensure_writable(folder)
    for path in paths:
        table = read(path)
        sources = {}
        for kernel in table.kernels:
            source = render(kernel.config(table.problem))
            if source.digest == kernel.source_digest:
                sources[kernel.id] = source.text
            else:
                click.echo(f"{kernel.id}: made from older templates, its source is left out; tune again to have it")
        written = export(path, folder / f"{table.device.slug}_{table.device.arch}", sources)
        click.echo(f"{written}: {len(table.kernels)} kernels, {len(sources)} sources")
