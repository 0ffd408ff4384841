"""One worker's run over the trials of a study: ask a batch, build it while the one before is timed, tell."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuner.errors import TunerError
from tuner.search.evaluate import Candidate, Evaluator, Scored, limit_us, score_of
from tuner.search.known import winners_elsewhere, winners_here
from tuner.search.progress import Tracker
from tuner.search.request import Failure, OnEvent, TuneRequest
from tuner.space import get_space
from tuner.space.core import Config, Space, Value

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from tuner.search.records import Record

DEFAULT_TRIALS = {"predicted": 96, "measured": 160}
DEFAULT_TIMEOUT_S = {"predicted": 180.0, "measured": 360.0}
_POLL_S = 0.5
_MAX_ERRORS = 5
"""Failures in a row that are nobody's configuration's fault, after which the search gives up."""

Batch = list[tuple["Trial", Config]]


@dataclass
class Search:
    """The run, and what it may sample: all that the request allows, or with ``narrow`` a part of it.

    ``prune``: kernels far slower than the best are timed on few buckets only. ``trials`` counts those in ``scope``.
    """

    request: TuneRequest
    evaluator: Evaluator
    study: Study
    tracker: Tracker
    trials: int
    limits_us: dict[str, float]
    refused: Counter[str]
    prune: bool = True
    scope: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    next_up: list[Config] = field(default_factory=list)
    """To try before any is sampled: enqueued one by one, so that no other scope gets them and what was left open comes
    first."""
    begun: bool = False
    scored: bool = False
    errors_in_a_row: int = 0
    open_trials: dict[int, Trial] = field(default_factory=dict)

    @staticmethod
    def open(request: TuneRequest, on_event: OnEvent | None, evaluator: Evaluator, *, landmarks: bool = True) -> Search:
        """Opens the study, takes over what dead workers left, and begins with the landmarks."""
        from tuner.search.storage import open_study, recover

        study = open_study(request, evaluator.fingerprint)
        recover(study)
        refused: Counter[str] = Counter()
        trials = request.trials or DEFAULT_TRIALS[request.evidence]
        timeout_s = request.timeout_s or DEFAULT_TIMEOUT_S[request.evidence]
        tracker = Tracker(trials, timeout_s, refused, on_event)
        limits = {b.key: limit_us(request.problem, request.shape, b, request.target) for b in request.buckets}
        search = Search(request, evaluator, study, tracker, trials, limits, refused)
        records = search.records()
        tracker.start_from(len(records))
        for record in records:
            tracker.note(record.config, record.score, record.failure)
        search.scored = tracker.has_best
        search._sample_from(request.restrict)
        if landmarks:
            search._begin_with_landmarks()
        return search

    def narrow(self, axis: str, value: Value, trials: int, timeout_s: float) -> None:
        """From here on only ``value`` of ``axis`` is sampled, beginning with the landmarks moved to it.

        ``trials`` counts those of this value, earlier runs included; ``timeout_s`` is since the search was opened.
        """
        self.scope = {axis: (value,)}
        self.trials = trials
        self.tracker.bound(timeout_s)
        self.begun = False
        self.scored = any(r.config[axis] == value and r.score is not None for r in self.records())
        self._sample_from({**self.request.restrict, **self.scope})
        space = self._space()
        moved = (c.with_(**{axis: value}) for c in self._landmarks(space))
        self.next_up = [c for c in moved if not space.refusals(c, self.request.target)]

    def _space(self) -> Space:
        from tuner.search.constraints import space_for

        return space_for(self.request.problem.op, self.request.shape.kv_heads, self.request.evidence)

    def _sample_from(self, allowed: Mapping[str, tuple[Value, ...]]) -> None:
        from tuner.search.sampler import FeasibleSampler

        request, space = self.request, self._space()
        # A resumed search must not draw the same samples again, nor two GPUs the same ones.
        seed = (request.seed + 7919 * len(self.study.get_trials(deepcopy=False)) + 104729 * request.device) % 2**32
        self.study.sampler = FeasibleSampler(
            space, space.restricted(allowed), request.problem, request.target, seed, self.refused
        )

    def _landmarks(self, space: Space) -> tuple[Config, ...]:
        """The default configuration, the seed's layout and what tends to win."""
        problem = self.request.problem
        return (space.default(problem), space.seed(problem), *space.leads(problem, self.request.shape.kv_heads))

    def _begin_with_landmarks(self) -> None:
        """Then with what won before on this device, what tends to win, and what won on others, as far as allowed."""
        space, problem, device = self._space(), self.request.problem, self.request.target.device_name
        axes = {axis.name: axis.values for axis in space.restricted(self.request.restrict).axes}
        default, seed, *leads = self._landmarks(space)
        self.next_up = [
            config
            for config in (*winners_here(problem, device), *leads, *winners_elsewhere(problem, device))
            if all(value in axes[name] for name, value in config.params)
            and not space.refusals(config, self.request.target)
        ]
        self._enqueue((default, seed))

    def _enqueue(self, configs: Iterable[Config]) -> None:
        """Enqueues what was not tried and is not about to be."""
        from optuna.trial import TrialState

        trials = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
        known = [t.params or t.system_attrs.get("fixed_params") for t in trials]
        for config in configs:
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
        builder = ThreadPoolExecutor(1, thread_name_prefix="build")
        try:
            while True:
                upcoming = self._ask()
                queued = builder.submit(self.evaluator.build, [c for _, c in upcoming]) if upcoming else None
                if building is None and queued is None:
                    return
                if building is not None:
                    self._evaluate(current, building.result())
                current, building = upcoming, queued
        except BaseException:
            self.evaluator.close()  # nobody waits for what is being built
            raise
        finally:
            builder.shutdown(cancel_futures=True)
            self._abandon()

    def wait_for_others(self, limit_s: float) -> None:
        """Until no other worker is at a trial of this study, at most ``limit_s``."""
        from tuner.search.storage import is_anyone_at_work

        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and is_anyone_at_work(self.study):
            time.sleep(_POLL_S)

    def _ask(self) -> Batch:
        """Up to a batch of new trials; several workers together do not exceed the number asked for."""
        from optuna.trial import TrialState

        from tuner.search.sampler import distributions, params_of
        from tuner.search.storage import worker_id

        if self.tracker.out_of_time and self.begun:
            return []
        self.begun = True
        space = get_space(self.request.problem.op)
        batch: Batch = []
        for _ in range(self.request.batch_size):
            trials = self.study.get_trials(deepcopy=False)
            counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
            spent = sum(t.state in counted and self._in_scope(t) for t in trials)
            if spent >= self.trials:
                break
            while self.next_up and not self._waiting():
                self._enqueue([self.next_up.pop(0)])
            enqueued = self._waiting()
            trial = self.study.ask(distributions(space))  # type: ignore[arg-type]
            trial.set_user_attr("worker", worker_id())
            self.open_trials[trial.number] = trial
            params = params_of(space, trial.params)
            # Another worker's trial may be half asked for: its parameters then equal no one's.
            others = [t for t in self.study.get_trials(deepcopy=False) if t.number != trial.number]
            others = [t for t in others if t.state not in (TrialState.FAIL, TrialState.WAITING)]
            if sum(t.number < trial.number and self._in_scope(t) for t in others) >= self.trials:
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

    def _waiting(self) -> bool:
        """Whether a trial is enqueued that no worker has asked for yet."""
        from optuna.trial import TrialState

        return any(t.state == TrialState.WAITING for t in self.study.get_trials(deepcopy=False))

    def _in_scope(self, trial: FrozenTrial) -> bool:
        return all(trial.params.get(axis) in values for axis, values in self.scope.items())

    def _give_up(self, trial: Trial, why: str) -> None:
        """Ends a trial that was asked for and shall not be evaluated; it does not count."""
        from optuna.trial import TrialState

        from tuner.search.storage import taken_over

        del self.open_trials[trial.number]
        with taken_over():
            trial.set_user_attr(why, True)
            self.study.tell(trial, state=TrialState.FAIL)

    def rivals(self, budget_s: float) -> tuple[str, ...]:
        """Names of the tuned baselines; found once per study, unless the request names its baselines."""
        from tuner.search.provenance import version
        from tuner.search.rivals import VERSION

        if self.request.baselines is not None or not any(r.score is not None for r in self.records()):
            return ()
        identity = [VERSION, version("triton")]
        known = self.study.user_attrs.get("rivals")
        if known and known["identity"] == identity:
            return tuple(known["names"])
        names = self.evaluator.rivals(lambda text: self.tracker.tell("race", text), budget_s)
        if names:  # nothing may also mean that the GPU's process died
            self.study.set_user_attr("rivals", {"identity": identity, "names": names})
        return names

    def _evaluate(self, batch: Batch, results: list[Candidate | Failure]) -> None:
        from tuner.search import records
        from tuner.search.storage import taken_over

        for (trial, config), result in zip(batch, results, strict=True):
            if self.tracker.out_of_time and self.scored:
                return  # what is left open is abandoned, and a resumed search begins with it
            record = self._record(trial.number, config, result)
            failure = record.failure
            if failure and failure.kind == "error":
                self.errors_in_a_row += 1
                if self.errors_in_a_row >= _MAX_ERRORS:
                    raise TunerError(f"gave up after {_MAX_ERRORS} errors in a row, the last: {failure.message}")
            else:
                self.errors_in_a_row = 0
            del self.open_trials[trial.number]
            with taken_over():
                records.tell(self.study, trial, record)
            self.scored |= record.score is not None
            self.tracker.trial(config, record.score, failure, self._finished())

    def _finished(self) -> int:
        """Trials that count, of all workers and scopes."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return len(self.study.get_trials(deepcopy=False, states=states))

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
            outcome: Scored | Failure = self.evaluator.score(result, best.timings if best and self.prune else None)
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
        """Trials that an error, an interrupt or the end of the time left open: whoever resumes begins with them.

        Not within a ``scope``: the next to run has another.
        """
        from tuner.search.storage import abandon

        for trial in self.open_trials.values():
            abandon(self.study, trial.number, trial.params, retry=not self.scope)
        self.open_trials.clear()
