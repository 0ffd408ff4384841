"""The search itself: ask a batch, build it while the one before is timed, tell, and at the end choose."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError, UsageError
from tuner.search.evaluate import Candidate, Evaluator, Scored, limit_us, score_of
from tuner.search.progress import Tracker
from tuner.search.request import Failure, OnEvent, TuneRequest, TuneResult
from tuner.space import get_space
from tuner.space.core import Config
from tuner.table.schema import EVIDENCE

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

    from tuner.search.records import Record

DEFAULT_TRIALS = {"predicted": 96, "measured": 160}
DEFAULT_TIMEOUT_S = {"predicted": 180.0, "measured": 360.0}
_MAX_ERRORS = 5
"""Failures in a row that are nobody's configuration's fault, after which the search gives up."""

Batch = list[tuple["Trial", Config]]


def tune(request: TuneRequest, on_event: OnEvent | None = None, evaluator: Evaluator | None = None) -> TuneResult:
    """Searches, races the finalists, selects the portfolio and writes the table.

    ``evaluator``: None means what ``request.evidence`` names. Raises TunerError / UsageError: storage that does not
    answer, unwritable output, no configuration that runs.
    """
    from tuner.search.choose import choose
    from tuner.search.storage import storage_url

    _check(request)
    evaluator = evaluator or _evaluator(request)
    try:
        search = _Search.open(request, on_event, evaluator)
        search.run()
        result = choose(request, search.records(), evaluator, search.tracker, search.rivals())
        return replace(result, study_name=search.study.study_name, storage=storage_url(request))
    finally:
        evaluator.close()


def export_study(request: TuneRequest, path: Path, evaluator: Evaluator | None = None) -> int:
    """Writes the study's trials as JSON, for replay on another machine; returns how many."""
    from tuner.search import records
    from tuner.search.storage import open_study

    space = get_space(request.problem.op)
    study = open_study(replace(request, resume=True), _fingerprint(request, evaluator))
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


@dataclass
class _Search:
    """One worker's run over the trials of a study."""

    request: TuneRequest
    evaluator: Evaluator
    study: Study
    tracker: Tracker
    trials: int
    limits_us: dict[str, float]
    errors_in_a_row: int = 0
    open_trials: dict[int, Trial] = field(default_factory=dict)

    @staticmethod
    def open(request: TuneRequest, on_event: OnEvent | None, evaluator: Evaluator) -> _Search:
        """Opens the study, takes over what dead workers left, and enqueues the landmarks."""
        from tuner.search.constraints import space_for
        from tuner.search.sampler import FeasibleSampler
        from tuner.search.storage import open_study, recover

        space = space_for(request.problem.op, request.shape.kv_heads)
        allowed = space.restricted(request.restrict)
        study = open_study(request, evaluator.fingerprint)
        recover(study)
        refused: Counter[str] = Counter()
        # A resumed search must not draw the same samples again, nor two GPUs the same ones.
        seed = (request.seed + 7919 * len(study.get_trials(deepcopy=False)) + 104729 * request.device) % 2**32
        study.sampler = FeasibleSampler(space, allowed, request.problem, request.target, seed, refused)
        trials = request.trials or DEFAULT_TRIALS[request.evidence]
        timeout_s = request.timeout_s or DEFAULT_TIMEOUT_S[request.evidence]
        tracker = Tracker(trials, timeout_s, refused, on_event)
        limits = {b.key: limit_us(request.problem, request.shape, b, request.target) for b in request.buckets}
        search = _Search(request, evaluator, study, tracker, trials, limits)
        records = search.records()
        tracker.start_from(len(records))
        for record in records:
            tracker.note(record.config, record.score, record.failure)
        search._enqueue_landmarks()
        return search

    def _enqueue_landmarks(self) -> None:
        """The default configuration, the seed's layout and what tends to win, unless tried or about to be."""
        from optuna.trial import TrialState

        from tuner.search.constraints import space_for

        problem, target, kv_heads = self.request.problem, self.request.target, self.request.shape.kv_heads
        space = space_for(problem.op, kv_heads)
        axes = {axis.name: axis.values for axis in space.restricted(self.request.restrict).axes}
        leads = [
            config
            for config in space.leads(problem, kv_heads)
            if all(value in axes[name] for name, value in config.params) and not space.refusals(config, target)
        ]
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
        known = [t.params or t.system_attrs.get("fixed_params") for t in trials]
        for config in (space.default(problem), space.seed(problem), *leads):
            params = dict(config.params)
            if params not in known:
                self.study.enqueue_trial(params)
                known.append(params)

    def records(self) -> list[Record]:
        from tuner.search import records

        return records.records(self.study, self.request.problem, get_space(self.request.problem.op))

    def run(self) -> None:
        """Until the trials are spent, the time is up, or nothing new is left in the space."""
        current: Batch = []
        building: Future[list[Candidate | Failure]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="build") as builder:
            try:
                while True:
                    upcoming = self._ask()
                    queued = builder.submit(self.evaluator.build, [c for _, c in upcoming]) if upcoming else None
                    if building is None and queued is None:
                        return
                    if building is not None:
                        self._evaluate(current, building.result())
                    current, building = upcoming, queued
            finally:
                self._abandon()

    def _ask(self) -> Batch:
        """Up to a batch of new trials; several workers together do not exceed the number asked for."""
        from optuna.trial import TrialState

        from tuner.search.sampler import distributions, params_of
        from tuner.search.storage import worker_id

        if self.tracker.out_of_time:
            return []
        space = get_space(self.request.problem.op)
        batch: Batch = []
        for _ in range(self.request.batch_size):
            trials = self.study.get_trials(deepcopy=False)
            spent = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) for t in trials)
            if spent >= self.trials:
                break
            enqueued = any(t.state == TrialState.WAITING for t in trials)
            trial = self.study.ask(distributions(space))  # type: ignore[arg-type]
            trial.set_user_attr("worker", worker_id())
            self.open_trials[trial.number] = trial
            params = params_of(space, trial.params)
            # Another worker's trial may be half asked for: its parameters then equal no one's.
            others = [t for t in self.study.get_trials(deepcopy=False) if t.number != trial.number]
            others = [t for t in others if t.state not in (TrialState.FAIL, TrialState.WAITING)]
            if sum(t.number < trial.number for t in others) >= self.trials:
                # Two workers asked at once for what was the last trial: the lower number has it.
                self._give_up(trial, "surplus")
                break
            if any(t.params == trial.params for t in others):
                self._give_up(trial, "duplicate")
                if enqueued:
                    continue  # an enqueued twin says nothing about what is left
                break  # the sampler found nothing new
            batch.append((trial, Config(self.request.problem, params)))
        return batch

    def _give_up(self, trial: Trial, why: str) -> None:
        """Ends a trial that was asked for and shall not be evaluated; it does not count."""
        from optuna.trial import TrialState

        trial.set_user_attr(why, True)
        self.study.tell(trial, state=TrialState.FAIL)
        del self.open_trials[trial.number]

    def rivals(self) -> tuple[str, ...]:
        """Names of the tuned baselines; found once per study, unless the request names its baselines."""
        from tuner.search.provenance import version
        from tuner.search.rivals import VERSION

        if self.request.baselines is not None or not any(r.score is not None for r in self.records()):
            return ()
        identity = [VERSION, version("triton")]
        known = self.study.user_attrs.get("rivals")
        if known and known["identity"] == identity:
            return tuple(known["names"])
        names = self.evaluator.rivals(lambda text: self.tracker.tell("race", text))
        if names:  # nothing may also mean that the GPU's process died
            self.study.set_user_attr("rivals", {"identity": identity, "names": names})
        return names

    def _evaluate(self, batch: Batch, results: list[Candidate | Failure]) -> None:
        from tuner.search import records

        for (trial, config), result in zip(batch, results, strict=True):
            record = self._record(trial.number, config, result)
            failure = record.failure
            if failure and failure.kind == "error":
                self.errors_in_a_row += 1
                if self.errors_in_a_row >= _MAX_ERRORS:
                    raise TunerError(f"gave up after {_MAX_ERRORS} errors in a row, the last: {failure.message}")
            else:
                self.errors_in_a_row = 0
            records.tell(self.study, trial, record)
            del self.open_trials[trial.number]
            self.tracker.trial(config, record.score, failure)

    def _record(self, number: int, config: Config, result: Candidate | Failure) -> Record:
        """Times what was built. Whatever goes wrong with one kernel is that kernel's failure and no one else's."""
        from tuner.search.records import Record

        if isinstance(result, Failure):
            return Record(number, config, None, None, {}, result)
        best = min(
            (r for r in self.records() if r.score is not None and not r.partial),
            key=lambda r: r.score or 0.0,
            default=None,
        )
        try:
            outcome: Scored | Failure = self.evaluator.score(result, best.timings if best else None)
        except TunerError as error:
            outcome = Failure("error", str(error))
        if isinstance(outcome, Failure):
            return Record(number, config, None, result, {}, outcome)
        score = score_of(outcome.timings, self.limits_us)
        if outcome.partial and best is not None and best.score is not None:
            # Scores over few buckets are not comparable as such; the ratio to the best over the same ones is.
            same = {b: best.timings[b] for b in outcome.timings if b in best.timings}
            score *= best.score / score_of(same, self.limits_us)
        return Record(number, config, score, result, outcome.timings, None, outcome.partial)

    def _abandon(self) -> None:
        """Trials that an error or an interrupt left open: whoever resumes begins with them."""
        from tuner.search.storage import abandon

        for trial in self.open_trials.values():
            abandon(self.study, trial.number, trial.params, retry=True)
        self.open_trials.clear()


def _check(request: TuneRequest) -> None:
    if request.evidence not in EVIDENCE:
        raise UsageError(f"evidence is {request.evidence!r}: expected one of {', '.join(EVIDENCE)}")
    if not request.buckets:
        raise UsageError("no buckets to tune for: expected at least one batch and context")
    for name, value in (("trials", request.trials), ("batch size", request.batch_size), ("workers", request.workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: expected at least 1")
    if request.problem.op == "decode" and request.problem.gqa != request.shape.gqa:
        raise UsageError(f"the problem's group size is {request.problem.gqa}, the shape's {request.shape.gqa}")


def _evaluator(request: TuneRequest) -> Evaluator:
    if request.evidence == "measured":
        from tuner.search.measured import MeasuredEvaluator

        return MeasuredEvaluator(request)
    from tuner.search.predicted import PredictedEvaluator

    return PredictedEvaluator(request)


def _fingerprint(request: TuneRequest, evaluator: Any) -> str:
    if evaluator is not None:
        return str(evaluator.fingerprint)
    own = _evaluator(request)
    own.close()
    return own.fingerprint
