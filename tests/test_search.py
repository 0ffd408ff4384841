"""Mechanics of the search: what is tried, in which order, and when it ends."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import optuna
import pytest
from analytic_search import BUCKETS, PROBLEM, TARGET, TRIALS, TUNED, Analytic, request_for, search

from tuner.errors import TunerError
from tuner.report.rows import rows
from tuner.search.constraints import space_for
from tuner.search.evaluate import Time
from tuner.search.sampler import FeasibleSampler, distributions, params_of
from tuner.space import Config, default_config, get_space, seed_config
from tuner.suits import CacheOrder, refusal
from tuner.table import explain, lookup, read, verify
from tuner.targets import get_target
from tuner.workload import Bucket, Shape


def test_end_to_end(tmp_path: Path) -> None:
    result, evaluator, events = search(tmp_path)
    assert result.path and verify(result.path) == () and read(result.path) == result.table
    assert len(evaluator.scored()) == TRIALS == len(set(evaluator.scored()))
    assert result.progress.done == result.progress.total == TRIALS
    table = result.table
    assert {e.batch for e in table.by_batch} == {1, 16} and len(table.by_batch_and_context) == len(BUCKETS)
    assert all(e.splits == 1 for e in table.by_batch_and_context if e.batch == 16)
    assert all(dict(e.timing.baselines_us)["fa3_bf16"] is None for e in table.by_batch_and_context)
    assert all(e.worst_ratio >= e.mean_ratio >= 1 for e in table.by_batch)
    assert [r.tuned_us for r in rows(table)] == [4 * r.time_us for r in rows(table)]
    assert {k.id for k in table.kernels} == set(result.cubins)
    assert lookup(table, 16, 65536) is not None
    trials = [e for e in events if e.stage == "search"]
    assert [e.progress.done for e in trials] == list(range(1, TRIALS + 1)) and trials[-1].progress.time_left_s == 0
    assert {e.stage for e in events} == {"search", "race", "table"}
    bests = [e.progress.best_score for e in trials]
    assert bests == sorted(bests, reverse=True)  # type: ignore[type-var]


def test_landmarks_come_first(tmp_path: Path) -> None:
    _, evaluator, _ = search(tmp_path, trials=3)
    first = evaluator.log[0][3]
    assert evaluator.log[0][0] == "build"
    assert first[0] == default_config(PROBLEM) and seed_config(PROBLEM) in first


def test_every_configuration_is_allowed(tmp_path: Path) -> None:
    result, evaluator, _ = search(tmp_path, trials=45)  # more than there are winners from before and leads
    space = get_space("decode")
    landmarks = {default_config(PROBLEM), seed_config(PROBLEM)}
    assert not [c for c in evaluator.scored() if c not in landmarks and space.refusals(c, TARGET)]
    assert result.progress.failures.get("constraint", 0) > 0, "refused samples are counted"


def test_restrictions_hold_for_all_but_the_landmarks(tmp_path: Path) -> None:
    result, evaluator, _ = search(tmp_path, restrict={"warps": (1, 2)})
    others = set(evaluator.scored()) - {default_config(PROBLEM), seed_config(PROBLEM)}
    assert others and all(c["warps"] in (1, 2) for c in others)
    assert all(dict(k.params)["warps"] in (1, 2) for k in result.table.kernels)


def test_shape_keeps_out_what_it_cannot_use(tmp_path: Path) -> None:
    request = request_for(tmp_path, shape=Shape(128, 8, 2))
    space, refused = space_for(PROBLEM.op, request.shape.kv_heads), Counter[str]()
    default, seed = default_config(PROBLEM), seed_config(PROBLEM)
    assert seed["head_warps"] == 4, "a landmark that the shape does not suit"
    assert [c.name for c in space.refusals(seed, TARGET)] == ["idle_head_warps"]
    assert not space.refusals(default, TARGET)
    bulk = default.with_(load="bulk", stages=2, load_bytes=16)
    assert "unreadable_cache" in [c.name for c in space.refusals(bulk, TARGET)]
    study = optuna.create_study(sampler=FeasibleSampler(space, space, PROBLEM, TARGET, 0, refused))
    for _ in range(40):
        config = Config(PROBLEM, params_of(space, study.ask(distributions(space)).params))
        assert config["head_warps"] in (1, 2)
        if config["load"] in ("bulk", "bulk_rows"):
            assert refusal(config, CacheOrder.standard(config, kv_heads=2)) is None
    assert refused["idle_head_warps"] > 0 and refused["unreadable_cache"] > 0
    _, evaluator, _ = search(tmp_path, shape=Shape(128, 8, 2), trials=3)
    assert {default, seed} <= set(evaluator.log[0][3])


def test_nothing_is_asked_for_that_the_shape_cannot_use(tmp_path: Path) -> None:
    result, evaluator, _ = search(tmp_path, restrict={"head_warps": (1, 8), "warps": (4,)}, shape=Shape(128, 8, 2))
    landmarks = {default_config(PROBLEM), seed_config(PROBLEM)}
    assert all(c["head_warps"] == 1 for c in set(evaluator.scored()) - landmarks) and result.table.kernels
    with pytest.raises(TunerError, match="no configuration was tried within the restrictions"):
        search(tmp_path, restrict={"head_warps": (8,)}, shape=Shape(128, 8, 2))


def test_triton_is_tuned_once_per_study(tmp_path: Path) -> None:
    assert search(tmp_path, trials=2)[1].sweeps == 1
    again, evaluator, _ = search(tmp_path, trials=2)
    assert evaluator.sweeps == 0 and TUNED in again.table.by_batch[0].timings[0].baselines_us
    named, evaluator, _ = search(tmp_path, trials=2, baselines=("triton",), output=None)
    assert evaluator.sweeps == 0 and TUNED not in named.table.by_batch[0].timings[0].baselines_us


def test_next_batch_is_built_while_one_is_timed(tmp_path: Path) -> None:
    _, evaluator, _ = search(tmp_path, Analytic(tmp_path, pause_s=0.2), batch_size=2)
    builds = [entry for entry in evaluator.log if entry[0] == "build"][:3]
    scores = [entry for entry in evaluator.log if entry[0] == "score"]
    overlaps = [1 for b in builds for s in scores if b[1] < s[2] and s[1] < b[2]]
    assert len(builds) == 3 and len(overlaps) >= 2, "all but the first are built meanwhile"


def test_clusters_are_predicted_where_they_were_seen() -> None:
    config = default_config(PROBLEM).with_(reduction="cluster2")
    cases = {("predicted", "sm_121"): ["unseen_clusters"], ("predicted", "sm_90"): [], ("measured", "sm_121"): []}
    for (evidence, arch), names in cases.items():
        assert [c.name for c in space_for("decode", 8, evidence).refusals(config, get_target(arch))] == names


def test_small_space_ends_when_it_is_used_up(tmp_path: Path) -> None:
    default = dict(default_config(PROBLEM).params)
    restrict = {n: (v,) for n, v in default.items() if n not in ("reduction", "tokens")}
    result, evaluator, _ = search(tmp_path, restrict=restrict, trials=50)
    assert len(evaluator.scored()) == len(set(evaluator.scored())) <= 19
    assert result.progress.done < 50


def test_time_limit(tmp_path: Path) -> None:
    result, evaluator, _ = search(tmp_path, Analytic(tmp_path, pause_s=0.4), trials=1000, timeout_s=1.0)
    assert 1 <= len(evaluator.scored()) <= 24 and result.path


def test_a_batch_ends_with_the_time_and_what_is_left_of_it_comes_first_later(tmp_path: Path) -> None:
    slow = Analytic(tmp_path, pause_s=1.0)
    search(tmp_path, slow, trials=8, timeout_s=1.4, batch_size=8)  # the build takes a second, then four per second
    assert 1 <= len(slow.scored()) <= 4
    _, later, _ = search(tmp_path, trials=8, batch_size=8)
    rest = [c for kind, _, _, configs in slow.log[:1] for c in configs if kind == "build" and c not in slow.scored()]
    assert later.scored()[: len(rest)] == rest and len(rest) >= 4


def test_equal_and_unequal_requests_each_get_what_serves_them(tmp_path: Path) -> None:
    class Ragged(Analytic):
        """Many splits suit equal lengths better than any other kernel would, and unequal ones far worse."""

        def time(self, config: Config, bucket: Bucket, splits: int) -> Time:
            us = super().time(config, bucket, 1).median_us
            if splits == 8 and bucket.batch > 8:
                us *= 3.0 if bucket.ragged else 0.7
            return Time(us, 0.99 * us, 1.01 * us)

    alike = {n: (v,) for n, v in default_config(PROBLEM).params if n not in ("reduction", "tokens")}
    result, _, _ = search(tmp_path, Ragged(tmp_path), restrict=alike)  # as fast as each other, by the formula
    splits = {(e.batch, e.timing.context, e.timing.ragged): e.splits for e in result.table.by_batch_and_context}
    assert (splits[16, 1024, False], splits[16, 65536, False], splits[16, 65536, True]) == (8, 8, 1)
    assert "slower for other lengths that this entry serves" in explain(result.table, 16).lines[-1]


def test_races_share_their_time_by_size_and_end_in_it(tmp_path: Path) -> None:
    result, evaluator, _ = search(tmp_path, race_timeout_s=10.0)
    shares = evaluator.shares_s
    assert set(shares) == {b.key for b in BUCKETS} and list(shares) != [b.key for b in BUCKETS], "in no order of size"
    assert shares["b1_c1024"] < shares["b16_c65536"] < 10  # slow baselines take long where the cache is large
    assert len(rows(result.table)) == len(BUCKETS)

    late = Analytic(tmp_path / "late")
    late.race_s = 0.4
    result, late, events = search(tmp_path / "late", late, race_timeout_s=0.6)
    assert len(late.shares_s) == 2
    assert any("no time left to race 3 of 5 buckets" in e.text for e in events)
    found = rows(result.table)  # those without a race keep the times of the search
    assert len(found) == len(BUCKETS) and sum(r.shipped_us is not None for r in found) == 2


def test_kernels_race_alone_before_the_time_goes_to_baselines(tmp_path: Path) -> None:
    """What is served is decided by races, however few of them the baselines' have time for."""
    hasty = Analytic(tmp_path)
    hasty.off, hasty.race_s = 0.08, 1.2
    result, _, events = search(tmp_path, hasty, trials=40, evidence="measured", race_timeout_s=2.0)
    with_baselines = [e for e in result.table.by_batch_and_context if e.timing.baselines_us]
    assert 0 < len(with_baselines) < len(BUCKETS) and len(hasty.alone) > 1
    assert any("buckets with the baselines" in e.text for e in events)
    assert any("kernels alone" in e.text for e in events)
    for entry in result.table.by_batch_and_context:
        bucket = Bucket(entry.batch, entry.timing.context, entry.timing.ragged)
        true = hasty.time(result.table.kernel(entry.kernel).config(PROBLEM), bucket, entry.splits)
        if bucket.key in hasty.alone:
            assert entry.timing.time_us == true.median_us and entry.runner_up and entry.runner_up.ratio >= 1

    predicted = Analytic(tmp_path / "predicted")
    search(tmp_path / "predicted", predicted)
    assert not predicted.alone and set(predicted.shares_s) == {b.key for b in BUCKETS}  # nothing to find out twice
