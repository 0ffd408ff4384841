"""The Optuna study: ask in batches, build, check, time, tell; resumable; many workers.

This package imports Optuna only once a search starts.
"""

from tuner.search.evaluate import Candidate, Evaluator, Time, Timings
from tuner.search.request import FAILURE_KINDS, Event, Failure, OnEvent, Progress, TuneRequest, TuneResult
from tuner.search.run import DEFAULT_TIMEOUT_S, DEFAULT_TRIALS
from tuner.search.study import DEFAULT_RACE_TIMEOUT_S, export_study, import_study, tune, work

__all__ = [
    "DEFAULT_RACE_TIMEOUT_S",
    "DEFAULT_TIMEOUT_S",
    "DEFAULT_TRIALS",
    "FAILURE_KINDS",
    "Candidate",
    "Evaluator",
    "Event",
    "Failure",
    "OnEvent",
    "Progress",
    "Time",
    "Timings",
    "TuneRequest",
    "TuneResult",
    "export_study",
    "import_study",
    "tune",
    "work",
]
