"""The search itself."""

from __future__ import annotations

from pathlib import Path

from tuner.search.evaluate import Evaluator
from tuner.search.request import OnEvent, TuneRequest, TuneResult

DEFAULT_TRIALS = {"predicted": 96, "measured": 160}
DEFAULT_TIMEOUT_S = {"predicted": 210.0, "measured": 360.0}


def tune(request: TuneRequest, on_event: OnEvent | None = None, evaluator: Evaluator | None = None) -> TuneResult:
    """Searches, races the finalists, selects the portfolio and writes the table.

    ``evaluator``: None means what ``request.evidence`` names. Raises TunerError / UsageError: storage that does not
    answer, unwritable output, no configuration that runs.
    """
    raise NotImplementedError


def export_study(request: TuneRequest, path: Path) -> int:
    """Writes the study's trials as JSON, for replay on another machine; returns how many."""
    raise NotImplementedError


def import_study(request: TuneRequest, path: Path) -> int:
    """Adds the trials of a recording to the request's study; returns how many were new. Raises TunerError."""
    raise NotImplementedError
