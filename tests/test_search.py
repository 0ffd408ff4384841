"""Mechanics of the search, with times from a formula over the real decode space in place of a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from tuner.baselines import TritonConstants, tuned_name
from tuner.errors import TunerError, UsageError
from tuner.report.rows import rows
from tuner.search import (
    Candidate,
    Event,
    Failure,
    Time,
    Timings,
    TuneRequest,
    TuneResult,
    export_study,
    import_study,
    tune,
)
from tuner.search.constraints import space_for
from tuner.search.evaluate import Final, Scored, limit_us
from tuner.search.sampler import FeasibleSampler, distributions, params_of
from tuner.search.storage import open_storage, open_study
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.suits import CacheOrder, refusal
from tuner.table import lookup, merge, read, verify
from tuner.targets import get_target
from tuner.workload import Bucket, Shape

SHAPE = Shape(128, 32, 8)
PROBLEM = Problem("decode", 128, 4, "turboquant_4bit_nc")
TARGET = get_target("sm_121")
BUCKETS = (Bucket(1, 1024), Bucket(1, 65536), Bucket(16, 1024), Bucket(16, 65536), Bucket(16, 65536, ragged=True))
TRIALS = 6
TUNED = tuned_name("triton", TritonConstants(block_kv=16, num_warps=4, num_stages=1, splits=32, block_h=16))


class Analytic:
    """Deterministic times: more warps suit long contexts, few suit short ones. Keeps a log of what it did."""

    fingerprint = "analytic"

    def __init__(self, root: Path, pause_s: float = 0.0, buckets: tuple[Bucket, ...] = BUCKETS) -> None:
        self.root, self.pause_s, self.buckets = root, pause_s, buckets
        self.log: list[tuple[str, float, float, tuple[Config, ...]]] = []
        self.sweeps = 0

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        start = time.monotonic()
        time.sleep(self.pause_s)
        results = [self._build(c) for c in configs]
        self.log.append(("build", start, time.monotonic(), tuple(configs)))
        return results

    def _build(self, config: Config) -> Candidate | Failure:
        digest = hashlib.sha256(config.describe().encode()).hexdigest()
        (self.root / "cubins").mkdir(parents=True, exist_ok=True)
        cubin = self.root / "cubins" / digest
        cubin.write_bytes(digest.encode())
        sha = hashlib.sha256(digest.encode()).hexdigest()
        return Candidate(config, digest, sha, str(cubin), 64 + config["tokens"], 1024, 0)

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
        start = time.monotonic()
        time.sleep(self.pause_s / 4)
        self.log.append(("score", start, time.monotonic(), (candidate.config,)))
        return Scored({b.key: {s: self.time(candidate.config, b, s) for s in (1, 8)} for b in self.buckets})

    def time(self, config: Config, bucket: Bucket, splits: int) -> Time:
        c = config
        fit = c["warps"] / (16 if bucket.context > 4096 else 1)
        cost = (
            1.2
            + abs(fit - 1)
            + 0.3 * (c["math"] == "fma")
            + 0.1 * c["stages"]
            + 0.5 * (splits == 8) * (bucket.batch > 8)
        )
        us = cost * limit_us(PROBLEM, SHAPE, bucket, TARGET)
        return Time(us, 0.99 * us, 1.01 * us)

    def confirm(self, candidate: Candidate) -> Failure | None:
        return None

    def rivals(self, tell: Callable[[str], None]) -> tuple[str, ...]:
        self.sweeps += 1
        tell("tuning the Triton baseline")
        return (TUNED,)

    def final(
        self, contestants: Sequence[tuple[Candidate, int]], bucket: Bucket, rivals: Sequence[str]
    ) -> Final | Failure:
        times = tuple(self.time(c.config, bucket, s) for c, s in contestants)
        winner = min(range(len(times)), key=lambda i: times[i].median_us)
        us = times[winner].median_us
        return Final(times, winner, False, {"triton": 10 * us, "fa3_bf16": None} | {n: 4 * us for n in rivals})

    def close(self) -> None:
        pass

    def scored(self) -> list[Config]:
        return [configs[0] for kind, _, _, configs in self.log if kind == "score"]


def request_for(root: Path, **changes: object) -> TuneRequest:
    request = TuneRequest(
        PROBLEM, SHAPE, BUCKETS, TARGET, "predicted", trials=TRIALS, batch_size=4, root=root, output=root / "tables"
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def search(
    root: Path, evaluator: Analytic | None = None, **changes: object
) -> tuple[TuneResult, Analytic, list[Event]]:
    evaluator = evaluator or Analytic(root)
    events: list[Event] = []
    return tune(request_for(root, **changes), events.append, evaluator), evaluator, events


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
    result, evaluator, _ = search(tmp_path, trials=14)
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
        assert config["load"] != "bulk" or refusal(config, CacheOrder.standard(config, kv_heads=2)) is None
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


def test_second_run_evaluates_nothing_and_more_trials_go_on(tmp_path: Path) -> None:
    first, _, _ = search(tmp_path)
    second, evaluator, _ = search(tmp_path)
    assert evaluator.scored() == [] and second.study_name == first.study_name
    assert second.table.by_batch == first.table.by_batch
    third, evaluator, _ = search(tmp_path, trials=TRIALS + 2)
    assert len(evaluator.scored()) == 2 and third.study_name == first.study_name


def test_without_resume_a_new_study_repeats_the_same_search(tmp_path: Path) -> None:
    first, a, _ = search(tmp_path, trials=4)
    second, b, _ = search(tmp_path, trials=4, resume=False)
    assert second.study_name == f"{first.study_name}-run2"
    assert a.scored() == b.scored(), "the same seed draws the same configurations"


def test_names_tell_studies_apart(tmp_path: Path) -> None:
    from tuner.search.storage import study_name

    request = request_for(tmp_path)
    base = study_name(request, "a")
    others = [
        study_name(request, "changed template"),
        study_name(replace(request, seed=1), "a"),
        study_name(replace(request, evidence="measured"), "a"),
        study_name(replace(request, target=get_target("sm_90")), "a"),
        study_name(replace(request, buckets=BUCKETS[:1]), "a"),
        study_name(replace(request, restrict={"warps": (1,)}), "a"),
    ]
    assert len({base, *others}) == 7
    assert study_name(replace(request, trials=99, buckets=BUCKETS[::-1]), "a") == base


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
    result, _, events = search(tmp_path, Faulty(tmp_path), trials=12)
    failures = dict(result.progress.failures)
    failures.pop("constraint", None)
    assert result.progress.done == 12 and len(failures) >= 3
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


def test_errors_of_the_machine_end_the_search_and_cost_no_trial(tmp_path: Path) -> None:
    class Gone(Analytic):
        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            raise TunerError("the GPU fell off the bus")

    with pytest.raises(TunerError, match="fell off the bus"):
        search(tmp_path, Gone(tmp_path))
    result, evaluator, _ = search(tmp_path, trials=9)
    assert len(evaluator.scored()) == 9 and default_config(PROBLEM) in evaluator.scored()
    assert result.progress.done == 9


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


def test_small_space_ends_when_it_is_used_up(tmp_path: Path) -> None:
    default = dict(default_config(PROBLEM).params)
    restrict = {n: (v,) for n, v in default.items() if n not in ("reduction", "tokens")}
    result, evaluator, _ = search(tmp_path, restrict=restrict, trials=50)
    assert len(evaluator.scored()) == len(set(evaluator.scored())) <= 7
    assert result.progress.done < 50


def test_time_limit(tmp_path: Path) -> None:
    result, evaluator, _ = search(tmp_path, Analytic(tmp_path, pause_s=0.4), trials=1000, timeout_s=1.0)
    assert 4 <= len(evaluator.scored()) <= 24 and result.path


_CHILD = """
import sys; from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search import Analytic, request_for
from tuner.search import tune
root = Path({root!r})
tune(request_for(root, trials={trials}), lambda e: print(e.progress.done, flush=True), Analytic(root, pause_s=0.4))
"""


def child(root: Path, trials: int) -> subprocess.Popen[str]:
    code = _CHILD.format(tests=str(Path(__file__).parent), root=str(root), trials=trials)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


def test_resume_after_sigkill(tmp_path: Path) -> None:
    process = child(tmp_path, 12)
    assert process.stdout
    done = 0
    while done < 5:
        done = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    study = open_study(request_for(tmp_path), "analytic")
    lost = [t for t in study.trials if t.state.name == "RUNNING"]
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert lost and len(finished) >= done
    result, evaluator, _ = search(tmp_path, trials=12)
    again = {c.params for c in evaluator.scored()}
    names = [a.name for a in get_space("decode").axes]
    assert again >= {tuple((n, t.params[n]) for n in names) for t in lost if t.params.keys() >= set(names)}
    assert not again & {tuple((n, t.params[n]) for n in names) for t in finished}, "nothing is timed twice"
    assert result.progress.done == 12 and len(evaluator.scored()) == 12 - len(finished)
    states = [t.state.name for t in open_study(request_for(tmp_path), "analytic").trials]
    assert "RUNNING" not in states and states.count("COMPLETE") == 12


def test_workers_share_a_study(tmp_path: Path) -> None:
    other = child(tmp_path, 12)
    assert other.stdout and int(other.stdout.readline()) == 1
    _, evaluator, _ = search(tmp_path, Analytic(tmp_path, pause_s=0.4), trials=12)
    other.communicate()
    assert other.returncode == 0
    trials = open_study(request_for(tmp_path), "analytic").trials
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert len(complete) == 12 == len({tuple(sorted(t.params.items())) for t in complete})
    assert 0 < len(evaluator.scored()) < 12


def test_recording_replays_elsewhere(tmp_path: Path) -> None:
    result, _, _ = search(tmp_path / "a")
    recording = tmp_path / "trials.json"
    assert export_study(request_for(tmp_path / "a"), recording, Analytic(tmp_path)) == TRIALS
    there = request_for(tmp_path / "b")
    assert import_study(there, recording, Analytic(tmp_path)) == TRIALS
    assert import_study(there, recording, Analytic(tmp_path)) == 0
    replayed, evaluator, _ = search(tmp_path / "b")
    assert evaluator.scored() == []
    assert replayed.table.by_batch_and_context == result.table.by_batch_and_context


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2}', '{"version": 1, "study": "x", "trials": [{"params": {"warps": 3}}]}']
)
def test_bad_recording(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(TunerError) as error:
        import_study(request_for(tmp_path), tmp_path / "r.json", Analytic(tmp_path))
    assert "\n" not in str(error.value)


def test_published_table_merges_or_keeps_what_was_there(tmp_path: Path) -> None:
    first, _, _ = search(tmp_path, Analytic(tmp_path, buckets=BUCKETS[:2]), buckets=BUCKETS[:2], trials=3)
    second, _, _ = search(tmp_path, Analytic(tmp_path, buckets=BUCKETS[2:]), buckets=BUCKETS[2:], trials=3)
    assert second.path and first.path == second.path
    assert {e.batch for e in read(second.path).by_batch} == {1, 16}
    assert merge(first.table, second.table).by_batch == read(second.path).by_batch
    second.path.write_text("{")
    third, _, events = search(tmp_path, trials=3)
    assert third.path and verify(third.path) == ()
    assert third.path.with_name(third.path.name + ".replaced").read_text() == "{"
    assert "kept as" in events[-1].text


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


def test_storage_that_refuses(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(TunerError, match="does not answer") as error:
        open_storage(f"postgresql://user:secret@127.0.0.1:{port}/db")
    assert time.monotonic() - start < 8 and "secret" not in str(error.value)


def test_storage_that_accepts_and_stays_silent() -> None:
    from tuner.search import storage

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/db"
        stop = threading.Timer(storage.ANSWER_S + 5, server.close)
        stop.start()
        start = time.monotonic()
        with pytest.raises(TunerError) as error:
            open_storage(url)
        stop.cancel()
    assert time.monotonic() - start < storage.ANSWER_S + 3 and "\n" not in str(error.value)


def test_storage_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in (f"sqlite:///{tmp_path}/file/x/study.db", f"sqlite:///{tmp_path}"):
        with pytest.raises(TunerError, match="cannot be") as error:
            open_storage(url)
        assert "\n" not in str(error.value)
    (tmp_path / "noise.db").write_bytes(os.urandom(5000))
    with pytest.raises(TunerError, match="cannot be used"):
        open_storage(f"sqlite:///{tmp_path}/noise.db")


def test_dequant_is_not_predicted(tmp_path: Path) -> None:
    problem = Problem("dequant", 128, 1, "turboquant_4bit_nc")
    with pytest.raises(UsageError, match="op decode only"):
        tune(request_for(tmp_path, problem=problem))


def test_recordings_are_compact(tmp_path: Path) -> None:
    search(tmp_path, trials=2)
    recording = tmp_path / "r.json"
    export_study(request_for(tmp_path), recording, Analytic(tmp_path))
    trial = json.loads(recording.read_text())["trials"][0]
    assert set(trial["timings"]) == {b.key for b in BUCKETS}
    assert len(json.dumps(trial["timings"])) < 70 * len(BUCKETS) * 2
