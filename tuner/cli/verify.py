"""The verb ``verify``: are these tables and cubins what they claim to be?"""

from __future__ import annotations

from pathlib import Path

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option
from tuner.cli.tables import table_paths, tables_argument
from tuner.errors import TunerError


@click.command("verify", context_settings=CONTEXT_SETTINGS)
@tables_argument
@debug_option
def command(tables: tuple[Path, ...]) -> None:
    """Check dispatch TABLES (files or folders): schema, cross references, and the SHA-256 of every cubin.

    Exits with 1 if any of them has a problem. Without TABLES: those in build/tables, else the shipped ones.
    """
    from tuner.table import verify

    paths = table_paths(tables)
    broken = 0
    for path in paths:
        problems = verify(path)
        broken += bool(problems)
        click.echo(f"{'BROKEN' if problems else 'ok':6}  {path}")
        for problem in problems:
            click.echo(f"        {problem}")
    if broken:
        raise TunerError(f"{broken} of {len(paths)} tables are broken: tune again, or remove them")
