"""Facts of a cubin's machine code: what the hot loop issues, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner.build import Built


@dataclass(frozen=True)
class Loop:
    """A loop, its inner loops included: instructions, cycles to issue them in one warp, and counts by opcode."""

    start: int
    end: int
    depth: int
    instructions: int
    stall_cycles: int
    opcodes: Mapping[str, int]


@dataclass(frozen=True)
class SassFacts:
    """One kernel of a cubin. ``loops`` are innermost first, then by size. Bytes loaded are per warp-wide execution."""

    kernel: str
    arch: str
    instructions: int
    stall_cycles: int
    opcodes: Mapping[str, int]
    """Full opcodes with their modifiers, for example ``LDG.E.128``."""
    loops: tuple[Loop, ...]


def disassemble(cubin: Path, kernel: str | None = None) -> SassFacts:
    """Facts of ``kernel`` (default: the only or largest kernel) of any cubin. Raises TunerError."""
    raise NotImplementedError


def facts(built: Built) -> SassFacts:
    """Facts of a build's main kernel, kept in ``facts.json`` beside the cubin."""
    raise NotImplementedError
