"""What a study keeps of each trial, in user attributes, and its exchange as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError
from tuner.search.evaluate import Candidate, Time, Timings
from tuner.search.request import FAILURE_KINDS, Failure
from tuner.space.core import Config, Problem, Space

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

RECORDING_VERSION = 2
"""Of what a trial's times mean: since 2 the L2 cache is flushed by reading. Other versions do not mix."""
_FACTS = ("source_digest", "cubin_sha256", "cubin", "registers", "shared_bytes", "spill_bytes")


@dataclass(frozen=True)
class Record:
    """One finished configuration: its score and timings, or its failure. ``number``: of the trial.

    ``partial``: it was timed on a sample of the buckets only, because it was far slower than the best.
    """

    number: int
    config: Config
    score: float | None
    candidate: Candidate | None
    timings: Timings
    failure: Failure | None
    partial: bool = False


def pack(timings: Timings) -> dict[str, dict[str, list[Any]]]:
    """Compact JSON: bucket -> splits -> [median], or [median, low, high, samples] and the clock where they are known;
    then the bottleneck where one is named."""
    return {b: {str(s): _pack_time(t) for s, t in row.items()} for b, row in timings.items()}


def unpack(data: Mapping[str, Mapping[str, list[Any]]]) -> Timings:
    return {b: {int(s): _unpack_time(t) for s, t in row.items()} for b, row in data.items()}


def tell(study: Study, trial: Trial, record: Record) -> None:
    """Finishes ``trial`` with ``record``. A failed configuration is told as pruned: TPE ranks it last.

    An error that is not its fault is told as failed, which TPE ignores, and which costs no trial.
    """
    from optuna.trial import TrialState

    for name, value in attributes(record).items():
        trial.set_user_attr(name, value)
    if record.failure and record.failure.kind == "error":
        study.tell(trial, state=TrialState.FAIL)
    elif record.score is None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, record.score)


def attributes(record: Record) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    if record.failure:
        attrs["failure"] = asdict(record.failure)
    if record.candidate:
        attrs["facts"] = {n: getattr(record.candidate, n) for n in _FACTS}
    if record.timings:
        attrs["timings"] = pack(record.timings)
    if record.partial:
        attrs["partial"] = True
    return attrs


def records(study: Study, problem: Problem, space: Space) -> list[Record]:
    """The finished trials of ``study`` in order; those lost with their worker are not among them."""
    from optuna.trial import TrialState

    names = [a.name for a in space.axes]
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [_record(t, problem, names) for t in trials if t.params.keys() >= set(names)]


def _record(trial: FrozenTrial, problem: Problem, names: Iterable[str]) -> Record:
    config = Config(problem, tuple((n, trial.params[n]) for n in names))
    attrs = trial.user_attrs
    return Record(
        trial.number,
        config,
        trial.values[0] if trial.values else None,
        Candidate(config, **attrs["facts"]) if "facts" in attrs else None,
        unpack(attrs.get("timings", {})),
        Failure(**attrs["failure"]) if "failure" in attrs else None,
        bool(attrs.get("partial")),
    )


def save(path: Path, study_name: str, items: Iterable[Record]) -> int:
    """Writes ``items`` as JSON; returns how many."""
    trials = [{"params": dict(r.config.params), "score": r.score, **attributes(r)} for r in items]
    data = {"version": RECORDING_VERSION, "study": study_name, "trials": trials}
    try:
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    except OSError as error:
        raise TunerError(f"cannot write the recording {path}: {error.strerror}") from None
    return len(trials)


def load(path: Path, problem: Problem, space: Space) -> list[Record]:
    """The records in the recording at ``path``. Raises TunerError where it is not one."""
    try:
        data = json.loads(path.read_text())
        if data["version"] != RECORDING_VERSION:
            raise TunerError(f"recording {path} has version {data['version']!r}: expected {RECORDING_VERSION}")
        return [_load(n, t, problem, space) for n, t in enumerate(data["trials"])]
    except OSError as error:
        raise TunerError(f"cannot read the recording {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TunerError(f"{path} is not a recording of a study: {type(error).__name__} at {str(error)[:80]}") from None


def _load(number: int, trial: Mapping[str, Any], problem: Problem, space: Space) -> Record:
    config = space.config(problem, trial["params"])
    failure = Failure(**trial["failure"]) if "failure" in trial else None
    if failure and failure.kind not in FAILURE_KINDS:
        raise ValueError(f"failure kind {failure.kind}")
    score = trial["score"]
    if score is not None and not (math.isfinite(score) and score > 0):
        raise ValueError(f"score {score}")
    candidate = Candidate(config, **trial["facts"]) if "facts" in trial else None
    timings = unpack(trial.get("timings", {}))
    return Record(number, config, score, candidate, timings, failure, bool(trial.get("partial")))


def _pack_time(time: Time) -> list[Any]:
    points = [float(f"{t:.6g}") for t in (time.median_us, time.ci_low_us, time.ci_high_us)]
    if time.samples is None and points[0] == points[1] == points[2]:
        points = points[:1]
    measured = [x for x in (time.samples, time.clock_mhz) if x is not None]
    return [*points, *measured, *([time.bottleneck] if time.bottleneck else [])]


def _unpack_time(data: list[Any]) -> Time:
    *points, last = data
    bottleneck = last if isinstance(last, str) else None
    times = points if bottleneck else data
    low, high = times[1:3] if len(times) >= 3 else (times[0], times[0])
    samples, clock_mhz = (*times[3:5], None, None)[:2]
    return Time(times[0], low, high, bottleneck, samples, clock_mhz)
