"""Many sources x architectures to cubins in one ninja graph: parallel, incremental, content-addressed, atomic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner.render import Source


@dataclass(frozen=True)
class Entry:
    """Resources of one kernel of a cubin, from ptxas. Registers per thread, spills as bytes stored plus loaded."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Built:
    """A cubin. Registers, spills, static shared memory and stack are the main kernel's; ``entries`` has them all."""

    digest: str
    arch: str
    cubin: Path
    cubin_sha256: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    stack_bytes: int
    seconds: float
    entry: str
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class BuildFailure:
    """A source that did not compile. ``message`` is the first error; source and full output stay beside ``log``."""

    digest: str
    arch: str
    kind: str
    """"compile" or "resource" (too much shared memory, too many registers)."""
    message: str
    log: Path


def build(
    sources: Iterable[Source],
    archs: Iterable[str],
    *,
    root: Path = Path("build"),
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 120.0,
) -> dict[tuple[str, str], Built | BuildFailure]:
    """Compiles every source for every arch; results by (digest, arch). What was built before is not built again.

    ``progress(done, total)`` counts results. Raises ToolchainError where there is no compiler.
    """
    raise NotImplementedError
