"""The whole of a search: run the trials, tune the baseline, race the finalists, write the table."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.search.evaluate import Evaluator
from tuner.search.request import OnEvent, TuneRequest, TuneResult
from tuner.search.run import Search
from tuner.space import get_space
from tuner.table.schema import EVIDENCE

DEFAULT_RACE_TIMEOUT_S = 75.0
OTHERS_S = 30.0
"""How long to wait for other workers' last trials once there are none left to begin."""
_RIVALS_SHARE = 0.3
"""Of the time after the search: for the constants of the Triton baseline."""


def tune(request: TuneRequest, on_event: OnEvent | None = None, evaluator: Evaluator | None = None) -> TuneResult:
    """Searches, races the finalists, selects the portfolio and writes the table.

    ``evaluator``: None means what ``request.evidence`` names. Raises TunerError / UsageError: storage that does not
    answer, unwritable output, no configuration that runs.
    """
    from tuner.search.choose import choose
    from tuner.search.storage import storage_errors, storage_url

    check_request(request)
    evaluator = evaluator or evaluator_for(request)
    with storage_errors(storage_url(request)), closing(evaluator):
        search = Search.open(request, on_event, evaluator)
        search.run()
        search.wait_for_others(OTHERS_S)
        after_s = request.race_timeout_s or DEFAULT_RACE_TIMEOUT_S
        deadline = time.monotonic() + after_s
        rivals = search.rivals(_RIVALS_SHARE * after_s)
        result = choose(request, search.records(), evaluator, search.tracker, rivals, deadline)
        return replace(result, study_name=search.study.study_name, storage=storage_url(request))


def work(request: TuneRequest, evaluator: Evaluator | None = None) -> None:
    """Works on the trials of a study that another process evaluates in the end. Raises as ``tune`` does."""
    from tuner.search.storage import storage_errors, storage_url

    check_request(request)
    evaluator = evaluator or evaluator_for(request)
    with storage_errors(storage_url(request)), closing(evaluator):
        Search.open(request, None, evaluator).run()


def export_study(request: TuneRequest, path: Path, name: str) -> int:
    """Writes the trials of the study ``name`` (``TuneResult.study_name``) as JSON; returns how many."""
    import optuna

    from tuner.search import records
    from tuner.search.storage import open_storage, storage_errors, storage_url

    space, url = get_space(request.problem.op), storage_url(request)
    with storage_errors(url):
        study = optuna.load_study(study_name=name, storage=open_storage(url))
    return records.save(path, study.study_name, records.records(study, request.problem, space))


def import_study(request: TuneRequest, path: Path, evaluator: Evaluator | None = None) -> int:
    """Adds the trials of a recording to the request's study; returns how many were new. Raises TunerError."""
    import optuna

    from tuner.search import records
    from tuner.search.sampler import distributions
    from tuner.search.storage import open_study

    space = get_space(request.problem.op)
    loaded = records.load(path, request.problem, space)
    study = open_study(replace(request, resume=True), _fingerprint(request, evaluator))
    known = {r.config.params for r in records.records(study, request.problem, space)}
    fresh = {r.config.params: r for r in loaded if r.config.params not in known}
    for record in fresh.values():
        state = optuna.trial.TrialState.PRUNED if record.score is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=record.score,
                params=dict(record.config.params),
                distributions=dict(distributions(space)),
                user_attrs=records.attributes(record),
            )
        )
    return len(fresh)


def check_request(request: TuneRequest) -> None:
    if request.evidence not in EVIDENCE:
        raise UsageError(f"evidence is {request.evidence!r}: expected one of {', '.join(EVIDENCE)}")
    if not request.buckets:
        raise UsageError("no buckets to tune for: expected at least one batch and context")
    for name, value in (("trials", request.trials), ("batch size", request.batch_size), ("workers", request.workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: expected at least 1")
    if request.problem.op == "decode" and request.problem.gqa != request.shape.gqa:
        raise UsageError(f"the problem's group size is {request.problem.gqa}, the shape's {request.shape.gqa}")


def evaluator_for(request: TuneRequest) -> Evaluator:
    if request.evidence == "measured":
        from tuner.search.measured import MeasuredEvaluator

        return MeasuredEvaluator(request)
    from tuner.search.predicted import PredictedEvaluator

    return PredictedEvaluator(request)


def _fingerprint(request: TuneRequest, evaluator: Any) -> str:
    if evaluator is not None:
        return str(evaluator.fingerprint)
    own = evaluator_for(request)
    own.close()
    return own.fingerprint
