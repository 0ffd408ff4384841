"""What this machine has and lacks, with the way out for each thing that is missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check. ``advice`` is empty where ``ok``."""

    name: str
    ok: bool
    detail: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Checks compilers, disassembler, GPU, packages, templates and the build folder; never raises."""
    raise NotImplementedError
