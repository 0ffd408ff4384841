"""A search that lives in a real PostgreSQL: shared by two workers, and gone on with after a kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from analytic_search import Analytic, child, open_together, request_for, search

from tuner.search.storage import open_study


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    found = postgres.programs()
    if found is None:
        pytest.skip("no PostgreSQL: initdb is neither on the PATH nor where Debian puts it")
    with postgres.server(found) as url:
        yield url


def complete(root: Path, storage: str, seed: int) -> list[dict[str, object]]:
    study = open_study(request_for(root, storage=storage, seed=seed), "analytic")
    return [t.params for t in study.trials if t.state.name == "COMPLETE"]


def test_two_workers_share_a_study(tmp_path: Path, storage: str) -> None:
    other = child(tmp_path, 32, storage=storage, seed=1)
    assert other.stdout and int(other.stdout.readline()) == 1
    result, evaluator, _ = search(tmp_path, Analytic(tmp_path, pause_s=0.4), trials=32, storage=storage, seed=1)
    other.communicate()
    assert other.returncode == 0
    found = complete(tmp_path, storage, 1)
    assert len(found) == 32 == len({tuple(sorted(p.items())) for p in found})
    assert 0 < len(evaluator.scored()) < 32
    assert result.path and result.path.is_file()
    assert not (tmp_path / "study.db").exists()


def test_a_killed_search_goes_on(tmp_path: Path, storage: str) -> None:
    process = child(tmp_path, 12, storage=storage, seed=2)
    assert process.stdout
    while int(process.stdout.readline()) < 5:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = len(complete(tmp_path, storage, 2))
    result, evaluator, _ = search(tmp_path, trials=12, storage=storage, seed=2)
    assert before >= 5 and len(evaluator.scored()) == 12 - before
    assert result.progress.done == 12 and len(complete(tmp_path, storage, 2)) == 12


def test_workers_may_make_the_tables_at_the_same_moment(storage: str) -> None:
    found = postgres.programs()
    assert found is not None
    with postgres.server(found) as fresh:
        assert open_together(fresh) == ["open"] * 3


def test_same_outcome_as_in_a_file(tmp_path: Path, storage: str) -> None:
    there, _, _ = search(tmp_path / "a", storage=storage, seed=3)
    here, _, _ = search(tmp_path / "b", seed=3)
    assert there.table.by_batch_and_context == here.table.by_batch_and_context
