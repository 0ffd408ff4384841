"""The verb ``export``: tables, cubins and readable sources in one folder, or kernels as a project of their own."""

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
    help="Where to write; one folder per target is made in it. With --standalone a new folder.",
)
@click.option(
    "--standalone",
    is_flag=True,
    help="Write a project of plain CUDA C++ instead: kernels, a C header, a build with CMake, tests.",
)
@debug_option
def command(tables: tuple[Path, ...], folder: Path, standalone: bool) -> None:
    """Copy TABLES with their cubins, and the CUDA source of every kernel as a person would read it.

    A source is rendered anew; where its code has changed since, it is left out and a line says so. A standalone
    project is refused in that case: it holds what was timed, or nothing.

    Example: python tune.py export build/tables --standalone --to wph
    """
    paths = table_paths(tables)
    if standalone:
        _standalone(paths, folder)
    else:
        _copies(paths, folder)


def _copies(paths: list[Path], folder: Path) -> None:
    from tuner.render import render
    from tuner.table import export, read

    ensure_writable(folder)
    for path in paths:
        table = read(path)
        sources = {}
        for kernel in table.kernels:
            source = render(kernel.config(table.problem))
            if source.digest == kernel.source_digest:
                sources[kernel.id] = source.text
            else:
                click.echo(f"{kernel.id}: made by another version, its source is left out; tune again to have it")
        written = export(path, folder / f"{table.device.slug}_{table.device.arch}", sources)
        click.echo(f"{written}: {len(table.kernels)} kernels, {len(sources)} sources")


def _standalone(paths: list[Path], folder: Path) -> None:
    from tuner.standalone import export_standalone
    from tuner.table import read

    kernels = export_standalone([read(path) for path in paths], folder)
    archs = sorted({kernel.kernel.arch for kernel in kernels})
    click.echo(f"{folder}: {len(kernels)} kernels for {', '.join(archs)}; README.md there says how to build and call")
