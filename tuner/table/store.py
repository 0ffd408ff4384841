"""Tables on disk: reading what may be damaged or hostile, writing atomically, finding, merging, exporting."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.geometry import dynamic_shared_bytes
from tuner.space import get_space
from tuner.space.core import Problem
from tuner.table.files import (
    MAX_CUBIN_BYTES,
    MAX_TABLE_BYTES,
    parse_json,
    read_beside,
    read_bounded,
    shorten,
    write_whole,
)
from tuner.table.portfolio import worst_and_mean
from tuner.table.schema import (
    SCHEMA_VERSION,
    BatchEntry,
    BucketEntry,
    Kernel,
    Table,
    TableError,
    from_json,
    kernel_id,
    table_file_name,
    to_json,
)

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
PACKAGE_TABLES = Path(__file__).resolve().parents[1] / "tables"
SCHEMA_FILE = Path(__file__).with_name("dispatch_table.schema.json")


def read(path: Path | str, *, arch: str | None = None, cubins: bool = True) -> Table:
    """The table at ``path``, checked: schema, cross references, and with ``cubins`` that every cubin has its hash.

    ``arch``: refuse a table whose kernels were not compiled for it. Raises TableError, one line, for anything else.
    """
    path = Path(path)
    table = _parse(parse_json(read_bounded(path, MAX_TABLE_BYTES), path), path)
    if arch is not None and table.device.arch != arch:
        raise TableError(f"{_name(path)} is for {table.device.arch}: expected a table for {arch}")
    if cubins:
        for kernel in table.kernels:
            read_cubin(path, table, kernel.id)
    return table


def read_cubin(path: Path | str, table: Table, kernel_id: str) -> bytes:
    """The verified bytes of one kernel of the table that was read from ``path``. Raises TableError."""
    kernel = table.kernel(kernel_id)
    data = read_beside(Path(path), f"{kernel.id}.cubin", MAX_CUBIN_BYTES)
    _check_hash(kernel.id, data, kernel.cubin_sha256)
    return data


def verify(path: Path | str) -> tuple[str, ...]:
    """Every problem of the table at ``path``, one line each; empty where all is well. Raises nothing."""
    try:
        table = read(path, cubins=False)
    except TableError as error:
        return (str(error),)
    problems = []
    if Path(path).name != table.file_name:
        problems.append(f"{_name(Path(path))} will not be found: expected the name {table.file_name}")
    for kernel in table.kernels:
        try:
            read_cubin(path, table, kernel.id)
        except TableError as error:
            problems.append(str(error))
    return tuple(problems)


def write(table: Table, folder: Path | str, cubins: Mapping[str, bytes]) -> Path:
    """Writes ``kernels/<id>.cubin`` for every kernel, then the table, each by rename: never half-written.

    ``cubins``: kernel id -> bytes. Returns the table's path. Raises TableError where a cubin is missing or has
    another hash, or the folder cannot be written; what was there before then still stands.
    """
    path = Path(folder) / table.file_name
    data = (json.dumps(to_json(table), indent=1, allow_nan=False) + "\n").encode()
    _parse(json.loads(data), path)  # what read() would refuse is never written
    for kernel in table.kernels:
        if kernel.id not in cubins:
            raise TableError(f"no cubin for kernel {kernel.id}: cannot write {_name(path)}")
        _check_hash(kernel.id, cubins[kernel.id], kernel.cubin_sha256)
    for kernel in table.kernels:
        write_whole(path.parent / "kernels" / f"{kernel.id}.cubin", cubins[kernel.id])
    write_whole(path, data)
    return path


def find(problem: Problem, device_name: str) -> Path | None:
    """Path of the table: in $VLLM_TUNED_CONFIG_FOLDER first, then where ``install`` puts them for this user without it,
    then among those that came with the package."""
    return find_file(table_file_name(problem, device_name))


def find_file(name: str) -> Path | None:
    """``name`` in the first of ``folders()`` that has it."""
    for folder in folders():
        try:
            if (folder / name).is_file():
                return folder / name
        except (OSError, ValueError):  # a folder name that the system cannot take
            continue
    return None


def folders() -> list[Path]:
    """Where tables and default kernels are looked for, in this order."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return [*([Path(chosen)] if chosen else []), user_folder(), PACKAGE_TABLES]


def user_folder() -> Path:
    """Folder "tuned" of vLLM's own configuration folder for this user: $VLLM_CONFIG_ROOT, by default ~/.config/vllm."""
    root = os.environ.get("VLLM_CONFIG_ROOT")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return (Path(root) if root else Path(home, "vllm")) / "tuned"


def merge(a: Table, b: Table) -> Table:
    """One table with the buckets of both; where both have one, the newer's (provenance.date). Choices for all contexts
    are compared with the buckets of the result.

    Predicted times are never mixed with measured ones: of unlike evidence the measured table is the result. Raises
    TableError where problem, device, or KV heads differ.
    """
    for what, left, right in (
        ("problem", a.problem, b.problem),
        ("device", (a.device.name, a.device.arch), (b.device.name, b.device.arch)),
        ("number of KV heads", a.kv_heads, b.kv_heads),
    ):
        if left != right:
            raise TableError(f"cannot merge tables of different {what}: {left} and {right}; keep them in two folders")
    if a.evidence != b.evidence:
        return a if a.evidence == "measured" else b
    old, new = sorted((a, b), key=lambda t: t.provenance.date)
    by_batch = {e.batch: e for e in (*old.by_batch, *new.by_batch)}
    by_bucket = {_bucket(e): e for e in (*old.by_batch_and_context, *new.by_batch_and_context)}
    used = {e.kernel for e in by_batch.values()} | {e.kernel for e in by_bucket.values()}
    kernels = {k.id: k for k in (*old.kernels, *new.kernels) if k.id in used}
    provenance = new.provenance
    survives = any(by_batch[e.batch] is e for e in old.by_batch)
    if survives or any(by_bucket[_bucket(e)] is e for e in old.by_batch_and_context):
        p = old.provenance
        line = shorten(f"{p.date} nvcc {p.nvcc} commit {p.git_commit} seed {p.seed}", 200)
        lines = dict.fromkeys((*p.history, *provenance.history, line))
        provenance = replace(provenance, history=tuple(lines)[-64:])
    return replace(
        new,
        provenance=provenance,
        kernels=tuple(kernels.values()),
        by_batch=tuple(_compared(by_batch[b], by_bucket) for b in sorted(by_batch)),
        by_batch_and_context=tuple(by_bucket[b] for b in sorted(by_bucket)),
    )


def _compared(entry: BatchEntry, by_bucket: Mapping[tuple[int, int, bool], BucketEntry]) -> BatchEntry:
    """``entry`` with the ratios of its times to those of the buckets' own choices, as far as there are such."""
    pairs = [
        (t.time_us, by_bucket[key].timing.time_us)
        for t in entry.timings
        if (key := (entry.batch, t.context, t.ragged)) in by_bucket
    ]
    if not pairs:
        return entry
    worst, mean = worst_and_mean(*zip(*pairs, strict=True))
    return replace(entry, worst_ratio=worst, mean_ratio=mean)


def export(path: Path | str, folder: Path | str, sources: Mapping[str, str] | None = None) -> Path:
    """Copies a verified table, its cubins and (kernel id -> CUDA text) ``sources/<id>.cu`` to ``folder``."""
    table = read(path)
    unknown = (sources or {}).keys() - {k.id for k in table.kernels}
    if unknown:
        raise TableError(f"sources of kernels that {table.file_name} does not have: {', '.join(sorted(unknown))}")
    for kernel, text in (sources or {}).items():
        write_whole(Path(folder) / "sources" / f"{kernel}.cu", text.encode())
    return write(table, folder, {k.id: read_cubin(path, table, k.id) for k in table.kernels})


@lru_cache(maxsize=1)
def _validator() -> Any:
    import jsonschema

    draft = jsonschema.Draft202012Validator
    # JSON Schema takes 8.0 for an integer; here nothing downstream should meet a float in place of one.
    types = draft.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(draft, type_checker=types)(json.loads(SCHEMA_FILE.read_text()))


def _parse(data: Any, path: Path) -> Table:
    """Schema, then what a schema cannot say: versions first, so that a newer table gets the message that helps."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise TableError(f"{_name(path)} is not a dispatch table: expected an object with schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        found = shorten(repr(version), 40)
        raise TableError(f"{_name(path)} has schema version {found}: expected {SCHEMA_VERSION}; tune again")
    try:
        error = next(_validator().iter_errors(data), None)
    except RecursionError:
        raise TableError(f"{_name(path)} is not a dispatch table: nested too deeply") from None
    if error is not None:
        place = shorten("/".join(map(str, error.absolute_path)) or "the table", 80)
        raise TableError(f"{_name(path)} breaks the schema at {place}: {shorten(error.message)}")
    try:
        table = from_json(data)
        _check_references(table)
    except UsageError as error:
        raise TableError(f"{_name(path)}: {shorten(str(error))}") from None
    except TableError as error:
        raise TableError(f"{_name(path)}: {error}") from None
    return table


def check_kernel(kernel: Kernel, problem: Problem) -> None:
    """That this version of the package launches ``kernel`` as it was compiled.

    Raises UsageError for an axis value that the space does not know, TableError for other shared memory.
    """
    # All of it is dynamic: the emulator refuses templates with static shared memory.
    launched = dynamic_shared_bytes(get_space(problem.op).validate(kernel.config(problem)))
    if kernel.shared_bytes != launched:
        raise TableError(
            f"kernel {kernel.id} wants {kernel.shared_bytes} bytes of shared memory and would be launched with "
            f"{launched}: it was made by another version of this package; make it anew"
        )


def _check_references(table: Table) -> None:
    """What the schema cannot say: ids, archs, axes, references, and each bucket once."""
    for kernel in table.kernels:
        if kernel.arch != table.device.arch:
            raise TableError(f"kernel {kernel.id} is for {kernel.arch}: expected {table.device.arch}, as its device")
        if kernel.id != kernel_id(kernel.arch, kernel.cubin_sha256):
            raise TableError(f"kernel {kernel.id} is not named by its arch and hash")
        check_kernel(kernel, table.problem)
    ids = {k.id for k in table.kernels}
    entries: Iterable[BatchEntry | BucketEntry] = (*table.by_batch, *table.by_batch_and_context)
    for entry in entries:
        if entry.kernel not in ids:
            raise TableError(f"batch {entry.batch} names kernel {entry.kernel}, which is not in the table")
    buckets = [_bucket(e) for e in table.by_batch_and_context]
    if len(set(buckets)) != len(buckets):
        raise TableError("a bucket stands twice in by_batch_and_context")


def _bucket(entry: BucketEntry) -> tuple[int, int, bool]:
    return entry.batch, entry.timing.context, entry.timing.ragged


def _check_hash(kernel: str, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        wanted = f"expected {expected[:16]}...; tune or install again"
        raise TableError(f"kernels/{kernel}.cubin has SHA-256 {found[:16]}...: {wanted}")


def _name(path: Path) -> str:
    return shorten(str(path), 300)
