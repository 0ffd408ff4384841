"""Tables on disk: reading what may be damaged or hostile, writing atomically, finding, merging, exporting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuner.space.core import Problem
from tuner.table.schema import Table

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
PACKAGE_TABLES = Path(__file__).resolve().parents[1] / "tables"


def read(path: Path | str, *, arch: str | None = None, cubins: bool = True) -> Table:
    """The table at ``path``, checked: schema, cross references, every cubin present and of its hash (unless not ``cubins``).

    ``arch``: refuse a table whose kernels do not run there. Raises TableError, one line, for anything else.
    """
    raise NotImplementedError


def read_cubin(path: Path | str, table: Table, kernel_id: str) -> bytes:
    """The verified bytes of one kernel of the table that was read from ``path``. Raises TableError."""
    raise NotImplementedError


def verify(path: Path | str) -> tuple[str, ...]:
    """Every problem of the table at ``path``, one line each; empty where all is well. Raises nothing."""
    raise NotImplementedError


def write(table: Table, folder: Path | str, cubins: Mapping[str, bytes]) -> Path:
    """Writes ``kernels/<id>.cubin`` for every kernel, then the table, each by rename: never half-written.

    ``cubins``: kernel id -> bytes. Returns the table's path. Raises TableError where a cubin is missing or has
    another hash, or the folder cannot be written; what was there before then still stands.
    """
    raise NotImplementedError


def find(problem: Problem, device_name: str) -> Path | None:
    """Path of the table: in $VLLM_TUNED_CONFIG_FOLDER first, then among those that came with the package."""
    raise NotImplementedError


def merge(a: Table, b: Table) -> Table:
    """One table with the buckets of both; where both have one, the newer's (provenance.date). Measured replaces predicted.

    Raises TableError where problem, device, or KV heads differ.
    """
    raise NotImplementedError


def export(path: Path | str, folder: Path | str, sources: Mapping[str, str] | None = None) -> Path:
    """Copies a verified table, its cubins and (kernel id -> CUDA text) ``sources/<id>.cu`` to ``folder``."""
    raise NotImplementedError
