"""Autotuner and run time for decode attention over compressed paged KV caches.

Importing this package is cheap: torch, CuPy and the compiler are loaded by the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.api import decode_attention, dequantize, load_tables, store

__version__ = "0.1.0"
__all__ = ["decode_attention", "dequantize", "load_tables", "store"]


def __getattr__(name: str) -> Any:
    """The public calls, imported when first used (PEP 562)."""
    if name in __all__:
        return getattr(import_module("tuner.api"), name)
    raise AttributeError(f"module 'tuner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
