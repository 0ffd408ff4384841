"""Which tables a verb works on: files, folders, or where they usually are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tuner.cli.options import DEFAULT_OUTPUT
from tuner.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def tables_argument(function: F) -> F:
    return click.argument("tables", nargs=-1, type=click.Path(path_type=Path), metavar="[TABLES]...")(function)


def table_paths(given: tuple[Path, ...]) -> list[Path]:
    """The tables that ``given`` files and folders name; without any, those of build/tables, else the shipped ones.

    Raises UsageError where there are none.
    """
    from tuner.table.install import TABLE_PATTERN

    if not given:
        from tuner.table.store import PACKAGE_TABLES

        given = (DEFAULT_OUTPUT,) if any(DEFAULT_OUTPUT.glob(TABLE_PATTERN)) else (PACKAGE_TABLES,)
    paths: list[Path] = []
    for place in given:
        found = sorted(place.glob(TABLE_PATTERN)) if place.is_dir() else [place]
        if not found or not (place.is_dir() or place.exists()):
            raise UsageError(f"no dispatch table at {place}: expected {TABLE_PATTERN}; tune first, or name the folder")
        paths += found
    return paths
