"""Whatever bytes a table file holds: the reader answers with a table or a TableError, and looks nowhere else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_table import IDS, make_table

from tuner.table import TableError, explain, lookup, read, verify, write

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
HOSTILE = st.sampled_from(
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "kernels/../x",
        "\x00",
        "\ud800",
        "sm_121-" + "0" * 16,
        -1,
        2**70,
        1e308,
        "a" * 300,
    ]
)
_opened: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], str | bytes):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_audit)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The paths that are opened meanwhile, as the interpreter itself reports them."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(make_table(), tmp_path_factory.mktemp("fuzz"), IDS)
    read(path)  # loads jsonschema and the schema, which are not what is watched
    return path


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with opened_files() as opened:
        try:
            table = read(path)
        except TableError as error:
            assert "\n" not in str(error) and str(error).isascii()
            assert verify(path)
        else:
            for batch in (1, 7, 10**6):
                lookup(table, batch, 4096)
                explain(table, batch)
    kernels = {f"{i}.cubin" for i in IDS}
    for name in opened:
        assert Path(name) in (path, path.parent / "kernels") or name in kernels, f"opened {name!r}"


@FUZZ
@given(JSON)
def test_any_json(path: Path, value: object) -> None:
    check(path, json.dumps(value).encode())


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(path: Path, content: bytes) -> None:
    check(path, content)


@FUZZ
@given(st.data())
def test_truncated_or_flipped(path: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(_good(), indent=1).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check(path, bytes(content[: data.draw(st.integers(0, len(content)))]))


@FUZZ
@given(st.data())
def test_mutated_tables(path: Path, data: st.DataObject) -> None:
    """Somewhere in a good table a value is replaced, removed, renamed or added."""
    table = _good()
    for _ in range(data.draw(st.integers(1, 3))):
        spot: Any = table
        while isinstance(spot, dict | list) and spot:
            key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
            if not isinstance(spot[key], dict | list) or not spot[key] or data.draw(st.integers(0, 4)) == 0:
                break
            spot = spot[key]
        action = data.draw(st.sampled_from(["replace", "remove", "rename", "duplicate"]))
        if action == "remove":
            del spot[key]
        elif action == "replace":
            spot[key] = data.draw(HOSTILE | JSON)
        elif isinstance(spot, dict):
            spot[str(data.draw(HOSTILE | st.text(max_size=8)))] = spot.pop(key) if action == "rename" else spot[key]
        else:
            spot.append(spot[key])
    check(path, json.dumps(table).encode())


def _good() -> dict[str, Any]:
    from tuner.table.schema import to_json

    return to_json(make_table())
