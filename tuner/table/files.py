"""Files that may be damaged or hostile: bounded reads that follow no link, writes that appear whole."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from tuner.table.schema import TableError

MAX_TABLE_BYTES = 16 << 20
MAX_CUBIN_BYTES = 64 << 20
_NO_FOLLOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: opening a named pipe must not hang before it is refused."""


def read_bounded(path: Path, limit: int, folder_fd: int | None = None) -> bytes:
    """Contents of a regular file of at most ``limit`` bytes, links refused. Raises TableError."""
    try:
        fd = os.open(path.name if folder_fd is not None else path, _NO_FOLLOW, dir_fd=folder_fd)
    except (OSError, ValueError) as error:
        raise TableError(f"cannot read {_name(path)}: {_reason(path, error)}") from None
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise TableError(f"{_name(path)} is not a plain file")
        if facts.st_size > limit:
            raise TableError(f"{_name(path)} has {facts.st_size} bytes: expected at most {limit}")
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise TableError(f"cannot read {_name(path)}: {error.strerror}") from None
    if len(data) > limit:
        raise TableError(f"{_name(path)} grew past {limit} bytes while it was read")
    return data


def read_beside(path: Path, name: str, limit: int) -> bytes:
    """Contents of ``kernels/<name>`` beside ``path``; neither the folder nor the file may be a link."""
    folder = path.parent / "kernels"
    try:
        fd = os.open(folder, _NO_FOLLOW | os.O_DIRECTORY)
    except (OSError, ValueError) as error:
        raise TableError(f"cannot open {_name(folder)}: {_reason(folder, error)}") from None
    try:
        return read_bounded(folder / name, limit, fd)
    finally:
        os.close(fd)


def parse_json(data: bytes, path: Path) -> Any:
    """The JSON value in ``data``; NaN, infinities and repeated keys are refused. Raises TableError."""

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    try:
        return json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=no_repeats)
    except RecursionError:
        raise TableError(f"{_name(path)} is not a dispatch table: nested too deeply") from None
    except ValueError as error:
        raise TableError(f"{_name(path)} is not valid JSON, perhaps truncated: {shorten(str(error))}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk, then renames.

    Raises TableError; ``path`` is then as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
            os.fchmod(fd, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise TableError(f"cannot write {_name(path)}: {error.strerror}; choose another folder") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def shorten(text: str, width: int = 120) -> str:
    """One printable ASCII line of at most ``width`` characters."""
    line = " ".join(ascii(text)[1:-1].split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _name(path: Path) -> str:
    return shorten(str(path), 300)


def _reason(path: Path, error: Exception) -> str:
    if os.path.islink(path):
        return "it is a link, and links are not followed"
    return getattr(error, "strerror", None) or shorten(str(error))
