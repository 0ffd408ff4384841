"""What is seen while a search runs: one live line on a terminal, else a plain line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from tuner.search import Event, Progress

PLAIN_INTERVAL_S = 5.0
"""Least time between two plain lines: enough to see that it lives, few enough for a log."""


def status_line(progress: Progress) -> str:
    """``trial 12/96, best 71% of the limit, failed: compile 1, about 40 s left``."""
    parts = [f"trial {progress.done}/{progress.total}"]
    if progress.best_score is not None:
        # A score is a geometric mean of time over limit, so its inverse is the mean share of the limit.
        parts.append(f"best {1 / progress.best_score:.0%} of the memory limit")
    failures = {kind: n for kind, n in progress.failures.items() if n and kind != "constraint"}
    if failures:
        parts.append("failed: " + ", ".join(f"{kind} {n}" for kind, n in sorted(failures.items())))
    if progress.time_left_s is not None:
        parts.append(f"about {duration(progress.time_left_s)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``45 s`` or ``3 min 05 s``."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class ProgressView:
    """Call it with every event of a search; use it as a context manager around the search."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._last_s = float("-inf")
        self._stage = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __call__(self, event: Event) -> None:
        line = status_line(event.progress) if event.stage == "search" else event.text
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
            return
        now = time.monotonic()
        last = event.stage == "search" and event.progress.done >= event.progress.total
        if event.stage != self._stage or last or now - self._last_s >= PLAIN_INTERVAL_S:
            self._console.print(line, soft_wrap=True)
            self._last_s, self._stage = now, event.stage

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
