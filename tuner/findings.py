"""What a check of ``doctor`` says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check. ``advice`` is empty where ``ok``."""

    name: str
    ok: bool
    detail: str
    advice: str = ""
