"""What lasts beyond a run of the search: studies, workers, recordings, tables, storage."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from analytic_search import BUCKETS, TRIALS, Analytic, child, open_together, request_for, search

from tuner.errors import TunerError, UsageError
from tuner.search import Candidate, Failure, Timings, export_study, import_study
from tuner.search.evaluate import Scored
from tuner.search.storage import open_storage, open_study
from tuner.space import get_space
from tuner.table import merge, read, verify, write
from tuner.targets import get_target


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
    other = child(tmp_path, 12, pause_s=2)  # slow enough for this one to begin before all is done
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
    assert export_study(request_for(tmp_path / "a"), recording, result.study_name) == TRIALS
    there = request_for(tmp_path / "b")
    assert import_study(there, recording, Analytic(tmp_path)) == TRIALS
    assert import_study(there, recording, Analytic(tmp_path)) == 0
    replayed, evaluator, _ = search(tmp_path / "b")
    assert evaluator.scored() == []
    assert replayed.table.by_batch_and_context == result.table.by_batch_and_context


def test_a_new_run_of_a_study_records_its_own_trials(tmp_path: Path) -> None:
    search(tmp_path, trials=3)
    second, _, _ = search(tmp_path, trials=5, resume=False)
    assert second.study_name.endswith("-run2")
    assert export_study(request_for(tmp_path), tmp_path / "r.json", second.study_name) == 5


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 1}', '{"version": 2, "study": "x", "trials": [{"params": {"warps": 3}}]}']
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
    third.path.write_text("[")
    fourth, _, events = search(tmp_path, trials=3)
    assert fourth.path and ".replaced-2" in events[-1].text
    aside = (".replaced", ".replaced-2")
    assert [fourth.path.with_name(fourth.path.name + end).read_text() for end in aside] == ["{", "["]


def test_a_measured_table_of_other_heads_is_not_replaced_by_a_predicted_one(tmp_path: Path) -> None:
    first, _, _ = search(tmp_path, trials=3)
    assert first.path
    measured = replace(first.table, evidence="measured", kv_heads=4)
    write(measured, first.path.parent, {i: f.read_bytes() for i, f in first.cubins.items()})
    second, _, events = search(tmp_path, trials=3)
    assert second.path and read(second.path) == measured and "kept the measured table" in events[-1].text


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


def test_workers_may_make_the_storage_at_the_same_moment(tmp_path: Path) -> None:
    for number in range(3):
        assert open_together(f"sqlite:///{tmp_path}/{number}.db") == ["open"] * 3


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_storage_that_ends_with_the_process_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected a file"):
        open_storage(url)


def test_a_storage_lost_on_the_way_is_one_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    class Cut(Analytic):
        def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
            (tmp_path / "study.db").write_bytes(b"no database at all" * 1000)
            return super().score(candidate, best)

    with pytest.raises(TunerError, match=r"storage sqlite:.* was lost: .*goes on") as error:
        search(tmp_path, Cut(tmp_path))
    assert "\n" not in str(error.value)


def test_workers_elsewhere_are_judged_by_the_time_since_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.search import storage

    me = storage.worker_id()
    assert storage._alive(me, None)
    assert not storage._alive(me | {"started": 1}, None), "another process has the id now"
    monkeypatch.setattr(storage, "_machine", lambda: "elsewhere")
    assert storage._alive(me, datetime(2000, 1, 1)), "its clock may show another local time"
    assert not storage._alive(me | {"since": time.time() - 7200}, None)


def test_storage_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in (f"sqlite:///{tmp_path}/file/x/study.db", f"sqlite:///{tmp_path}"):
        with pytest.raises(TunerError, match="cannot be") as error:
            open_storage(url)
        assert "\n" not in str(error.value)
    (tmp_path / "noise.db").write_bytes(os.urandom(5000))
    with pytest.raises(TunerError, match="cannot be used"):
        open_storage(f"sqlite:///{tmp_path}/noise.db")


def test_recordings_are_compact(tmp_path: Path) -> None:
    result, _, _ = search(tmp_path, trials=2)
    recording = tmp_path / "r.json"
    export_study(request_for(tmp_path), recording, result.study_name)
    trial = json.loads(recording.read_text())["trials"][0]
    assert set(trial["timings"]) == {b.key for b in BUCKETS}
    assert len(json.dumps(trial["timings"])) < 70 * len(BUCKETS) * 2
