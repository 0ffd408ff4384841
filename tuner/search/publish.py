"""Writing a new table where an older one may stand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tuner.errors import TunerError
from tuner.table.schema import Table, TableError
from tuner.table.store import merge, read, read_cubin, write


def publish(table: Table, folder: Path, cubins: Mapping[str, Path]) -> tuple[Path, str]:
    """Writes ``table`` to ``folder``, merged with the one that is there; returns its path and what was done.

    A measured table is not replaced by a predicted one. One that cannot be merged (damaged, of another schema, or
    tuned with other KV heads) is kept beside the new one with the ending ``.replaced``, ``.replaced-2`` and so on.
    """
    path = folder / table.file_name
    try:
        new = {i: file.read_bytes() for i, file in cubins.items()}
    except OSError as error:
        raise TunerError(f"cannot read the cubin {error.filename}: {error.strerror}; tune again") from None
    if not os.path.lexists(path):
        return write(table, folder, new), f"wrote {path}"
    try:
        old = read(path)
        merged = old if (old.evidence, table.evidence) == ("measured", "predicted") else merge(old, table)
    except TableError as error:
        names = (path.with_name(f"{path.name}.replaced{n}") for n in ("", *(f"-{i}" for i in range(2, 10_000))))
        aside = next(name for name in names if not os.path.lexists(name))
        try:
            os.replace(path, aside)
        except OSError as problem:
            raise TunerError(f"cannot move {path} aside: {problem.strerror}; choose another --output") from None
        return write(table, folder, new), f"wrote {path}; the old table is kept as {aside.name}: {error}"
    if merged is old:
        return path, f"kept the measured table {path}: a predicted one does not replace it"
    kept = {k.id: read_cubin(path, old, k.id) for k in old.kernels}
    return write(merged, folder, kept | new), f"wrote {path}, merged with the table that was there"
