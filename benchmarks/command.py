"""What the commands of this folder share: the GPU they need, the record they leave, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuner.errors import TunerError, UsageError
from tuner.targets import Target, attached


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


def ended(run: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser) -> int:
    """Exit code of ``run``; 1 where it failed and 2 for bad usage, with one line on standard error."""
    try:
        return run(parser.parse_args())
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
