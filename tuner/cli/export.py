"""The verb ``export``: tables, cubins and readable sources in one folder, or kernels as a project of their own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option, ensure_writable
from tuner.cli.tables import table_paths, tables_argument
from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.table import Table


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
@click.option(
    "--device",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only tables of this GPU, for example H200; may be repeated.  [default: all; with --standalone the attached "
    "GPU's where those of several would answer the same calls]",
)
@debug_option
def command(tables: tuple[Path, ...], folder: Path, standalone: bool, names: tuple[str, ...]) -> None:
    """Copy TABLES with their cubins, and the CUDA source of every kernel as a person would read it.

    A source is rendered anew; where its code has changed since, it is left out and a line says so. A standalone
    project is refused in that case: it holds what was timed, or nothing.

    Example: python tune.py export --standalone --device H200 --to wph
    """
    from tuner.standalone.devices import of_devices
    from tuner.standalone.project import ensure_new
    from tuner.table import read

    if standalone:
        ensure_new(folder)
    found = of_devices({path: read(path) for path in table_paths(tables)}, names)
    if standalone:
        _standalone(_answering_once(list(found.values()), tables, folder), folder)
    else:
        _copies(found, folder)


def _copies(tables: dict[Path, Table], folder: Path) -> None:
    from tuner.render import render
    from tuner.table import export

    ensure_writable(folder)
    for path, table in tables.items():
        sources = {}
        for kernel in table.kernels:
            source = render(kernel.config(table.problem))
            if source.digest == kernel.source_digest:
                sources[kernel.id] = source.text
            else:
                click.echo(f"{kernel.id}: made by another version, its source is left out; tune again to have it")
        written = export(path, folder / f"{table.device.slug}_{table.device.arch}", sources)
        click.echo(f"{written}: {len(table.kernels)} kernels, {len(sources)} sources")


def _answering_once(tables: list[Table], given: Sequence[Path], folder: Path) -> list[Table]:
    """``tables``; those of the attached GPU where tables of several would answer the same calls.

    Raises UsageError, with a command that works, where no GPU of those is attached.
    """
    from tuner.cli import program_name
    from tuner.standalone.devices import devices, rivals, short_name

    if not (several := rivals(tables)):
        return tables
    if here := _attached_of(tables):
        click.echo(f"tables of {here[0].device.name}, the attached GPU; --device chooses others")
        return here
    names = devices(several)
    name = short_name(names[0], devices(tables))
    example = ["export", *map(str, given), "--standalone", "--device", name, "--to", str(folder)]
    raise UsageError(
        f"tables of {' and '.join(names)} answer the same calls on {several[0].device.arch}: choose a GPU, "
        f"for example {program_name()} {shlex.join(example)}"
    )


def _attached_of(tables: list[Table]) -> list[Table]:
    """The tables of the attached GPU; none where there is no GPU, or one that nothing is known about."""
    from tuner.standalone.devices import of_target
    from tuner.targets import attached

    try:
        here = attached()
    except UsageError:
        return []
    return of_target(tables, here) if here else []


def _standalone(tables: list[Table], folder: Path) -> None:
    from tuner.standalone import export_standalone

    kernels = export_standalone(tables, folder)
    archs = sorted({kernel.kernel.arch for kernel in kernels})
    click.echo(f"{folder}: {len(kernels)} kernels for {', '.join(archs)}; README.md there says how to build and call")
