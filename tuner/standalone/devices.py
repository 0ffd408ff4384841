"""Whose tables an export takes. Two GPUs of one architecture cannot both be served: a call names the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tuner.errors import UsageError
from tuner.space import Problem
from tuner.table import Table
from tuner.table.schema import file_slug
from tuner.targets import Target, device_slug


def of_devices(tables: Mapping[Path, Table], names: Sequence[str]) -> dict[Path, Table]:
    """The tables of the devices that ``names`` name; without names all of them.

    A name is a device's own or words of it, in any case: "H200", "h100 80gb". Raises UsageError where one fits none.
    """
    known = devices(tables.values())
    chosen: set[str] = set()
    for name in names:
        if not (found := _named(name, known)):
            raise UsageError(f"no tables of a GPU {name!r}: expected one of {', '.join(known)}")
        chosen |= set(found)
    return {path: table for path, table in tables.items() if not names or table.device.name in chosen}


def devices(tables: Iterable[Table]) -> list[str]:
    """The devices that ``tables`` are of, each once, in alphabetical order."""
    return sorted({table.device.name for table in tables})


def rivals(tables: Sequence[Table]) -> list[Table]:
    """The tables of an architecture for which those of several devices answer the same calls; none without one."""
    owners: dict[tuple[str, Problem], set[str]] = {}
    for table in tables:
        owners.setdefault((table.device.arch, table.problem), set()).add(table.device.slug)
    archs = sorted(arch for (arch, _), slugs in owners.items() if len(slugs) > 1)
    return [table for table in tables if table.device.arch in archs[:1]]


def of_target(tables: Sequence[Table], here: Target) -> list[Table]:
    """The tables of the GPU ``here``, or of its family where that shares its tables."""
    return [table for table in tables if table.device.slug == file_slug(here.device_name)]


def short_name(device: str, known: Sequence[str]) -> str:
    """The first word of ``device`` that no other of the ``known`` devices has, its whole name where there is none."""
    return next((word for word in device.split() if _named(word, known) == [device]), device)


def _named(name: str, known: Sequence[str]) -> list[str]:
    """The devices of that name; without one, those that have all its words."""
    if not _words(name):
        return []
    whole = [device for device in known if _words(device) == _words(name)]
    return whole or [device for device in known if set(_words(name)) <= set(_words(device))]


def _words(name: str) -> list[str]:
    return device_slug(name).lower().replace("_", " ").split()
