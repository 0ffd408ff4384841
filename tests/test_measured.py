"""The measuring evaluator: what it makes of races, and of a machine on which nothing can be measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tuner.build import Built, build
from tuner.measure import Failure as MeasureFailure
from tuner.measure import Race, Sample
from tuner.render import render
from tuner.search.evaluate import Candidate, Final, Time
from tuner.search.measured import MeasuredEvaluator
from tuner.search.request import Failure, TuneRequest
from tuner.space import Problem, default_config
from tuner.targets import get_target
from tuner.workload import Bucket, Shape

PROBLEM = Problem("decode", 128, 4, "turboquant_4bit_nc")
CONFIG = default_config(PROBLEM)
BUCKETS = tuple(Bucket(b, c) for b in (1, 2, 8, 32) for c in (1024, 4096, 16384))


@pytest.fixture
def evaluator(tmp_path: Path) -> Iterator[MeasuredEvaluator]:
    request = TuneRequest(
        PROBLEM, Shape(128, 32, 8), BUCKETS, get_target("sm_90"), "measured", root=tmp_path, workers=1
    )
    made = MeasuredEvaluator(request)
    yield made
    made.close()


def race_of(times: dict[str, float], failures: dict[str, MeasureFailure] | None = None) -> Race:
    """A race in which every contestant takes its time, give or take one percent, in the same rounds."""
    rounds = {n: tuple(t * (1 + 0.01 * ((i * 7) % 5 - 2) / 2) for i in range(40)) for n, t in times.items()}
    return Race(rounds, {n: Sample.of(r) for n, r in rounds.items()}, failures or {})


def test_the_fastest_kernel_wins_and_rivals_that_failed_have_no_time(evaluator: MeasuredEvaluator) -> None:
    race = race_of({"kernel0": 50.0, "kernel1": 40.0, "triton": 80.0})
    final = evaluator._judge(race, ["kernel0", "kernel1"], ["triton", "sdpa_bf16"])
    assert isinstance(final, Final)
    assert final.winner == 1 and not final.tie
    sample = race.samples["kernel1"]
    assert final.times[1] == Time(
        sample.median_us, sample.ci_low_us, sample.ci_high_us, None, sample.n, sample.clock_mhz
    )
    assert final.baselines_us == {"triton": race.samples["triton"].median_us, "sdpa_bf16": None}


def test_a_kernel_that_failed_cannot_win(evaluator: MeasuredEvaluator) -> None:
    race = race_of({"kernel1": 40.0}, {"kernel0": MeasureFailure("resource", "too many registers")})
    final = evaluator._judge(race, ["kernel0", "kernel1"], [])
    assert isinstance(final, Final)
    assert final.winner == 1 and final.times[0] is None
    nobody = evaluator._judge(race_of({}, race.failures), ["kernel0"], [])
    assert nobody == Failure("error", "too many registers")
    assert evaluator._judge(race_of({}), ["kernel0"], []) == Failure("error", "no kernel finished the race")


def test_probes_are_few_and_spread_over_the_batches(evaluator: MeasuredEvaluator) -> None:
    probes = evaluator._probes()
    assert len(probes) == len(set(probes)) < len(BUCKETS)
    assert {p.batch for p in probes} >= {1, 32}
    assert all(p in BUCKETS for p in probes)
    assert max(p.context for p in probes) < 16384


def test_baselines_are_those_of_the_op_unless_named(evaluator: MeasuredEvaluator, tmp_path: Path) -> None:
    assert "triton" in evaluator._baseline_names() and "triton_dequant" not in evaluator._baseline_names()
    request = TuneRequest(
        PROBLEM, Shape(128, 32, 8), BUCKETS, get_target("sm_90"), "measured", root=tmp_path, baselines=("sdpa_bf16",)
    )
    named = MeasuredEvaluator(request)
    assert named._baseline_names() == ["sdpa_bf16"]
    named.close()


def test_without_a_gpu_every_answer_is_a_failure(evaluator: MeasuredEvaluator, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is what a machine without one answers")
    assert evaluator._measurer.channel.pid is None
    candidate = evaluator.build([CONFIG])[0]
    assert evaluator._measurer.channel.pid, "it starts while the first kernels are compiled"
    assert isinstance(candidate, Candidate), candidate
    assert candidate.registers > 0 and Path(candidate.cubin).is_file()
    answers = (
        evaluator.score(candidate, None),
        evaluator.confirm(candidate),
        evaluator._time(candidate, BUCKETS[:2], {}),
        evaluator.final([(candidate, 4)], BUCKETS[0], (), 1.0),
    )
    told: list[str] = []
    assert evaluator.rivals(told.append, 20.0) == () and told  # constants were tried, and none of them ran
    for answer in answers:
        assert isinstance(answer, Failure)
        assert answer.kind == "error" and "no NVIDIA GPU" in answer.message
    source = render(CONFIG)
    again = build([source], ["sm_90"], root=tmp_path)[source.digest, "sm_90"]
    assert isinstance(again, Built) and again.cubin == Path(candidate.cubin)  # where the builder keeps them
