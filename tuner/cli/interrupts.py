"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. Where that is a destructor or the callback of a
weak reference (SQLAlchemy has many), the interpreter reports the exception as ignored and goes on.
"""

from __future__ import annotations

import signal
import sys

RETRY_S = 0.02
"""Until an interrupt that was ignored is raised again: by then the callback has usually returned."""


def keep_interrupts() -> None:
    """From here on an interrupt that a callback swallowed is raised again, until one arrives where it counts.

    For the main thread of a program, once. Takes SIGALRM for itself.
    """
    report = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        else:
            report(ignored)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = hook
