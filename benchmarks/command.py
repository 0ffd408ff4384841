"""What the commands of this folder share: the GPU they need, the record they leave, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tuner.errors import TunerError, UsageError
from tuner.targets import Target, attached

_STOP_S = 15.0
"""Time that a command gets to end after it was interrupted."""
_CHECK_S = 0.1
"""Between looks at the time and at whether to stop."""


def attached_gpu(index: int) -> Target:
    """The facts of an attached GPU. Raises TunerError where there is none."""
    target = attached(index)
    if target is None:
        raise TunerError(f"no GPU {index}: this command measures; `python tune.py doctor` says what is there")
    return target


def write_record(path: Path, device: str, driver: str | None, found: Mapping[str, Any]) -> None:
    """``found``, measured on ``device``, as JSON with the command and the date."""
    origin = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device,
        "driver": driver,
        "evidence": "measured",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(origin | dict(found), indent=1) + "\n")


def run_bounded(
    words: Sequence[str],
    log: IO[str],
    limit_s: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> int | None:
    """Exit status of a command whose output goes to ``log``; None where it had to be ended after ``limit_s``.

    It is interrupted first, as by Ctrl-C, and killed with what it started where that does not end it: nothing is left
    on the GPU. An interrupt of the caller is passed on in the same way. ``stop``: once set, by another thread, the
    command is killed.
    """
    deadline, stop = time.monotonic() + limit_s, stop or threading.Event()
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cwd, env=env, process_group=0)
    try:
        while time.monotonic() < deadline and not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                return child.wait(_CHECK_S)
        return None
    finally:
        if child.poll() is None and not stop.is_set():
            os.killpg(child.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def ended(run: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser) -> int:
    """Exit code of ``run``; 1 where it failed and 2 for bad usage, with one line on standard error."""
    try:
        status = run(parser.parse_args())
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
