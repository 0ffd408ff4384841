"""Tables where vLLM finds them: what would be installed, installing it, and taking it out again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import TunerError
from tuner.table.schema import Table, TableError
from tuner.table.store import FOLDER_VARIABLE, merge, read, read_cubin, user_folder, write

TABLE_PATTERN = "turboquant_*.json"
DEFAULTS_PATTERN = "wph_default_*.json"
CUBIN_PATTERN = "sm_*-*.cubin"


@dataclass(frozen=True)
class Step:
    """One table that will be written; ``merged`` with one that was already there."""

    path: Path
    table: Table
    cubins: dict[str, bytes]
    merged: bool


def install_folder() -> Path:
    """Where tables are installed: $VLLM_TUNED_CONFIG_FOLDER if that is set, else the user's folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else user_folder()


def plan(paths: Sequence[Path], folder: Path, *, allow_predicted: bool = False) -> list[Step]:
    """What installing ``paths`` into ``folder`` would write; reads and verifies everything, writes nothing.

    Raises TunerError for a table that is broken, predicted (unless allowed), or cannot be merged with the one there.
    """
    steps: dict[Path, Step] = {}
    for path in paths:
        table = read(path)
        if table.evidence == "predicted" and not allow_predicted:
            raise TunerError(
                f"{path.name} is predicted, never timed on a {table.device.name}: tune on one, or add --allow-predicted"
            )
        cubins = {kernel.id: read_cubin(path, table, kernel.id) for kernel in table.kernels}
        there = folder / table.file_name
        before = steps.get(there) or _installed(there)
        if before is not None:
            table = merge(before.table, table)
            cubins = {kernel.id: (before.cubins | cubins)[kernel.id] for kernel in table.kernels}
        merged = before is not None and (before.merged or there not in steps)
        steps[there] = Step(there, table, cubins, merged)
    return list(steps.values())


def carry_out(steps: Sequence[Step]) -> None:
    """Writes every table of a plan, each whole or not at all, cubins before the table that names them."""
    for step in steps:
        write(step.table, step.path.parent, step.cubins)


def installed(folder: Path) -> list[Path]:
    """Our files in ``folder``: tables first, so that removing in this order never leaves a table without its cubins."""
    indexes = (path for pattern in (TABLE_PATTERN, DEFAULTS_PATTERN) for path in sorted(folder.glob(pattern)))
    return [*indexes, *sorted((folder / "kernels").glob(CUBIN_PATTERN))]


def uninstall(folder: Path) -> list[Path]:
    """Removes our tables and cubins from ``folder`` and returns them; other files stay. Raises TunerError."""
    paths = installed(folder)
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise TunerError(f"cannot remove {path}: {error.strerror}") from None
    kernels = folder / "kernels"
    if kernels.is_dir() and not any(kernels.iterdir()):
        kernels.rmdir()
    return paths


def _installed(path: Path) -> Step | None:
    """The table at ``path`` with its cubins if it is whole; a broken one is as good as none and gets replaced."""
    try:
        table = read(path)
        return Step(path, table, {k.id: read_cubin(path, table, k.id) for k in table.kernels}, True)
    except TableError:
        return None
