"""The console that every verb prints to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 132
"""Columns where the output is not a terminal (a log, a pipe): wide enough that no table wraps its numbers."""


def console() -> Console:
    """Standard output as rich sees it; $COLUMNS is honoured."""
    from rich.console import Console

    found = Console(highlight=False, soft_wrap=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PLAIN_WIDTH
    return found
