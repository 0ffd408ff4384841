"""Runs a rendered kernel on the CPU, lane by lane, under address, undefined-behaviour and alignment sanitizers.

The source is compiled, unchanged, with g++ and ``-DWPH_EMULATE`` against ``tuner/emulator/emulate.h``, and runs in
a child process: whatever a kernel does wrong arrives here as an EmulationError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tuner.errors import TunerError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DEFAULT_ROOT = Path("build")


class HasText(Protocol):
    """Anything with the CUDA source in ``text``, a render.Source for example."""

    @property
    def text(self) -> str: ...


class EmulationError(TunerError):
    """The kernel did something wrong. The message is one line; ``report`` is all that the child process wrote."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Launch:
    """One launch: grid in CTAs (x, y, z), block in threads (a multiple of 32), dynamic shared memory in bytes."""

    entry: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0


def emulate(
    source: HasText,
    launches: Launch | Sequence[Launch],
    params: ctypes.Structure,
    buffers: Mapping[str, Tensor | NDArray | None],
    *,
    seed: int = 0,
    concurrent_ctas: int = 1,
    timeout_s: float = 120.0,
    root: Path = DEFAULT_ROOT,
) -> None:
    """Runs ``launches`` one after another, all with ``params``, and writes the buffers back in place.

    ``buffers`` maps each pointer field of ``params`` to a CPU tensor or array; None is a null pointer, and so is a
    field left out. A tensor stands for its whole storage, from which one byte too far on either side is an error;
    the pointer is that of its first element. Tensors that share a storage share a buffer. The storage starts on a
    256-byte boundary, as a CUDA allocation does.

    ``seed`` other than 0 shuffles the order of CTAs, warps and lanes; ``concurrent_ctas`` lets so many CTAs take turns.

    Raises EmulationError for anything that a sanitizer or the emulator finds, including divergent collectives,
    deadlocks and a run longer than ``timeout_s``; then the buffers are as before. Raises UsageError for arguments
    that no GPU would take.
    """
    raise NotImplementedError


def compile_source(source: HasText, *, root: Path = DEFAULT_ROOT) -> Path:
    """The emulated kernel as an executable, compiled once per text; raises EmulationError with g++'s first error."""
    raise NotImplementedError


def compile_many(sources: Iterable[HasText], *, jobs: int = 2, root: Path = DEFAULT_ROOT) -> list[Path]:
    """compile_source() of many sources, ``jobs`` at a time."""
    raise NotImplementedError
