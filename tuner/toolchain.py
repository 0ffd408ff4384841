"""Finds the compiler, the disassembler and their helpers, and remembers why a candidate was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import TunerError


class ToolchainError(TunerError):
    """A tool is missing or too old; the line says where it was looked for and how to get it."""


@dataclass(frozen=True)
class Candidate:
    """A place where a tool was looked for. ``detail`` is its version where it is fit for use, else why it is not."""

    source: str
    path: Path | None
    ok: bool
    detail: str


@dataclass(frozen=True)
class Toolchain:
    """An nvcc that works. ``env`` is the environment to start it with, ``source`` where it was found."""

    nvcc: Path
    version: str
    source: str
    env: Mapping[str, str]
    candidates: tuple[Candidate, ...]


def find() -> Toolchain:
    """The first nvcc that compiles for every target. Raises ToolchainError with every candidate's reason."""
    raise NotImplementedError


def find_gxx() -> Path:
    """The host's C++ compiler. Raises ToolchainError."""
    raise NotImplementedError


def find_ninja() -> Path:
    """Ninja's binary, from its package or PATH. Raises ToolchainError."""
    raise NotImplementedError


def find_nvdisasm() -> Path:
    """A disassembler that knows SM121. Raises ToolchainError."""
    raise NotImplementedError
