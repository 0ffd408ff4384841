"""Ctrl-C that neither gets lost nor breaks what must be whole.

Python raises KeyboardInterrupt wherever the main thread happens to be. Where that is a destructor or the callback of a
weak reference (SQLAlchemy has many), the interpreter reports the exception as ignored and goes on. Where it is the
middle of a database's statement or of its clean-up, a lock or a broken session stays behind, and what the program
stores while it ends waits for that in vain.
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

RETRY_S = 0.003
"""Until an interrupt that was ignored or put off is tried again: by then most have a better moment."""
LONGEST_S = 2.0
"""An interrupt is not put off for longer: what takes more time hangs."""

_whole: set[str] = set()


def put_off_within(package: str) -> None:
    """From here on no interrupt is raised within calls of that package."""
    _whole.add(package)


def keep_interrupts() -> None:
    """From here on an interrupt is raised where it may be, and again if a callback swallowed it.

    For the main thread of a program, once, which calls let_go() before it ends. Takes SIGALRM for itself. Where
    interrupts are ignored, they stay so.
    """
    report = sys.unraisablehook
    came_at: float | None = None

    def interrupted(signum: int, frame: FrameType | None) -> None:
        nonlocal came_at
        now = time.monotonic()
        came_at = came_at or now
        if now - came_at < LONGEST_S and _is_within(frame):
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
            return
        came_at = None
        raise KeyboardInterrupt

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        else:
            report(ignored)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGALRM, interrupted)
    sys.unraisablehook = hook


def let_go() -> None:
    """From here on nothing is raised again: an alarm that came after the interpreter has put its handlers away, set by
    a destructor that is called then, would end the program with a code of its own."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _is_within(frame: FrameType | None) -> bool:
    """Whether ``frame``, or one that called it, is of a package that must be left alone."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if any(module == package or module.startswith(f"{package}.") for package in _whole):
            return True
        frame = frame.f_back
    return False
