"""Kernels that fail, machines that fail, and requests that cannot be met."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from analytic_search import BUCKETS, PROBLEM, Analytic, request_for, search
from optuna.trial import TrialState

from tuner.errors import TunerError, UsageError
from tuner.search import Candidate, Failure, Timings, tune
from tuner.search.compiled import Compiler
from tuner.search.evaluate import Scored
from tuner.search.storage import open_study
from tuner.space import Config, Problem, default_config
from tuner.workload import Shape


class Faulty(Analytic):
    """Fails in every way a kernel can."""

    kinds = ("resource", "wrong result", "timeout", "crash")

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        results = super().build(configs)
        return [
            Failure("compile", "error: no") if c["math"] == "fma" else r for c, r in zip(configs, results, strict=True)
        ]

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
        if candidate.config == default_config(PROBLEM):
            return super().score(candidate, best)
        super().score(candidate, best)
        kind = candidate.source_digest[0]
        return Failure(self.kinds[int(kind, 16) % 4], "broken") if kind < "c" else super().score(candidate, best)


def test_failures_are_recorded_and_kill_nothing(tmp_path: Path) -> None:
    result, _, events = search(tmp_path, Faulty(tmp_path), trials=20)
    failures = dict(result.progress.failures)
    failures.pop("constraint", None)
    assert result.progress.done == 20 and len(failures) >= 3
    study = open_study(request_for(tmp_path), "analytic")
    recorded = [t.user_attrs["failure"]["kind"] for t in study.trials if "failure" in t.user_attrs]
    assert sorted(recorded) == sorted(e.failure.kind for e in events if e.failure)
    assert {t.state.name for t in study.trials if "failure" in t.user_attrs} == {"PRUNED"}


def test_nothing_runs(tmp_path: Path) -> None:
    class Broken(Analytic):
        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            return Failure("wrong result", "relative error 0.5")

    with pytest.raises(TunerError, match=r"none of 4 configurations runs \(wrong result\).*relative error 0.5"):
        search(tmp_path, Broken(tmp_path), trials=4)
    assert not (tmp_path / "tables").exists()


def test_an_interrupt_closes_the_evaluator_before_it_waits_for_what_is_being_built(tmp_path: Path) -> None:
    class Interrupted(Analytic):
        closed = threading.Event()

        def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
            if self.log:  # the second batch: only closing ends it
                assert self.closed.wait(30)
            return super().build(configs)

        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            raise KeyboardInterrupt

        def close(self) -> None:
            self.closed.set()

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Interrupted(tmp_path), trials=12)
    assert time.monotonic() - start < 20


def test_errors_of_the_machine_end_the_search_and_cost_no_trial(tmp_path: Path) -> None:
    class Gone(Analytic):
        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            raise TunerError("the GPU fell off the bus")

    with pytest.raises(TunerError, match="fell off the bus"):
        search(tmp_path, Gone(tmp_path))
    result, evaluator, _ = search(tmp_path, trials=9)
    assert len(evaluator.scored()) == 9 and default_config(PROBLEM) in evaluator.scored()
    assert result.progress.done == 9


def test_a_compiler_that_did_not_get_to_the_source_says_nothing_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [default_config(PROBLEM)]
    with monkeypatch.context() as broken:
        broken.setenv("CXX", "/bin/false")
        (failed,) = Compiler("sm_90", tmp_path, None).build(configs)
    assert isinstance(failed, Failure) and failed.kind == "error"
    (built,) = Compiler("sm_90", tmp_path, None).build(configs)
    assert isinstance(built, Candidate)


def test_when_no_finalist_passes_the_last_gate_that_is_what_is_said(tmp_path: Path) -> None:
    class Strict(Analytic):
        def confirm(self, candidate: Candidate) -> Failure | None:
            return Failure("wrong result", "late")

    with pytest.raises(TunerError, match=r"finalists passes the gate once more, the last: wrong result: late"):
        search(tmp_path, Strict(tmp_path))


def test_a_trial_that_another_worker_took_over_costs_nothing_else(tmp_path: Path) -> None:
    class Overtaken(Analytic):
        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            if len(self.scored()) == 1:  # somebody takes this worker for dead
                study = open_study(request_for(self.root), "analytic")
                running = study.get_trials(states=(TrialState.RUNNING,))
                study.tell(min(t.number for t in running), state=TrialState.FAIL)
            return super().score(candidate, best)

    result, evaluator, _ = search(tmp_path, Overtaken(tmp_path), trials=6)
    assert result.progress.done == 6 and len(evaluator.scored()) == 7
    states = [t.state for t in open_study(request_for(tmp_path), "analytic").trials]
    assert states.count(TrialState.COMPLETE) == 6 and states.count(TrialState.FAIL) == 1


def test_finalist_that_fails_the_last_gate_is_not_published(tmp_path: Path) -> None:
    first, _, _ = search(tmp_path / "a")
    banned = {dict(k.params)["warps"] for k in first.table.kernels}
    banned.discard(default_config(PROBLEM)["warps"])

    class Strict(Analytic):
        def confirm(self, candidate: Candidate) -> Failure | None:
            return Failure("wrong result", "late") if candidate.config["warps"] in banned else None

    assert banned
    second, _, events = search(tmp_path / "b", Strict(tmp_path / "b"))
    assert not {dict(k.params)["warps"] for k in second.table.kernels} & banned
    assert any(e.failure and e.failure.message == "late" for e in events)


def test_partial_timings_never_reach_the_table(tmp_path: Path) -> None:
    class Early(Analytic):
        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            scored = super().score(candidate, best)
            assert isinstance(scored, Scored)
            if best is None or candidate.config == default_config(PROBLEM):
                return scored
            key = BUCKETS[0].key
            return Scored({key: scored.timings[key]}, partial=True)

    result, _, _ = search(tmp_path, Early(tmp_path))
    assert [k.params for k in result.table.kernels] == [default_config(PROBLEM).params]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tables").write_text("a file")
    with pytest.raises(TunerError, match="cannot write"):
        search(tmp_path, trials=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, "trials is 0"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"evidence": "guessed"}, "evidence"),
        ({"buckets": ()}, "no buckets"),
        ({"restrict": {"warps": (3,)}}, "warps"),
        ({"shape": Shape(128, 32, 4)}, "group size"),
        ({"storage": "nonsense"}, "not a URL"),
        ({"storage": "oracle9://x/y"}, "storage"),
    ],
)
def test_bad_requests(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(TunerError, match=words) as error:
        search(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_store_is_not_predicted(tmp_path: Path) -> None:
    problem = Problem("store", 128, 1, "turboquant_4bit_nc")
    with pytest.raises(UsageError, match=r"the static model knows .* only: attach a NVIDIA GB10 to tune store"):
        tune(request_for(tmp_path, problem=problem))
