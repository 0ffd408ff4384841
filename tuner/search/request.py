"""What a search is asked for, what it tells while it runs, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuner.space.core import Config, Problem, Value
from tuner.table.schema import Table
from tuner.targets import Target
from tuner.workload import Bucket, Shape

FAILURE_KINDS = ("constraint", "compile", "resource", "wrong result", "timeout", "crash", "error")
"""The last one is not the configuration's fault (a GPU that went away, say) and so says nothing about it."""


@dataclass(frozen=True)
class TuneRequest:
    """One search: a problem on a target, over buckets.

    ``evidence``: "measured" (on GPU ``device``) or "predicted" (static model). ``trials`` counts the finished trials of
    the study, earlier runs and other workers included; None: ``DEFAULT_TRIALS``. ``timeout_s`` bounds the trials;
    None: ``DEFAULT_TIMEOUT_S``. ``race_timeout_s`` bounds what follows them: Triton's constants, the full gate, the
    races; None: ``DEFAULT_RACE_TIMEOUT_S``. ``batch_size``: trials compiled together.
    ``storage``: an Optuna RDB URL, None: SQLite at ``root``/study.db. ``resume``: go on with the study of the same
    name if there is one, else start a new one beside it. ``workers``: parallel compilations, None: one per core.
    ``restrict``: axis -> allowed values. ``output``: the folder that the table is written to, None: not written.
    """

    problem: Problem
    shape: Shape
    buckets: tuple[Bucket, ...]
    target: Target
    evidence: str
    trials: int | None = None
    timeout_s: float | None = None
    race_timeout_s: float | None = None
    batch_size: int = 8
    seed: int = 0
    storage: str | None = None
    resume: bool = True
    workers: int | None = None
    root: Path = Path("build")
    output: Path | None = Path("build/tables")
    restrict: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    device: int = 0
    baselines: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """Why a configuration has no time; ``kind`` is one of FAILURE_KINDS."""

    kind: str
    message: str


@dataclass(frozen=True)
class Progress:
    """Where a search stands. ``score`` values are geometric means of time / memory-limit time: 1.0 is the limit.

    ``failures``: kind -> trials; kind "constraint" counts refused samples, which cost no trial.
    ``time_left_s`` is an estimate, None before the first trial.
    """

    done: int
    total: int
    failures: Mapping[str, int]
    best_score: float | None
    best: Config | None
    elapsed_s: float
    time_left_s: float | None


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``stage``: "search" (a trial ended), "race" (finalists), "table" (written).

    For a trial: ``config`` and either ``score`` or ``failure``. ``text`` is one line about it.
    """

    stage: str
    progress: Progress
    text: str
    config: Config | None = None
    score: float | None = None
    failure: Failure | None = None


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class TuneResult:
    """``path`` is None where the table was not written. ``cubins``: kernel id -> file."""

    table: Table
    path: Path | None
    cubins: Mapping[str, Path]
    progress: Progress
    study_name: str
    storage: str
