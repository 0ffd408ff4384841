"""Processes that share a search: here with predicted times, in place of a second GPU."""

from __future__ import annotations

import time
from pathlib import Path

from analytic_search import request_for

from tuner.cli.helpers import Helpers
from tuner.search.storage import open_study
from tuner.search.study import evaluator_for


def test_a_helpers_time_began_with_ours(tmp_path: Path) -> None:
    """It begins no trial once the search is over, however long it took to start, and leaves none open."""
    request = request_for(tmp_path, trials=10_000, timeout_s=3600.0, batch_size=1)
    with Helpers(request, (1,)) as late:
        late.start(0.0)
        late._processes[0].join(60)
        assert late._processes[0].exitcode == 0
    assert not list(tmp_path.rglob("*.db"))
    start = time.monotonic()
    with Helpers(request, (1,)) as helpers:
        helpers.start(10.0)
        helpers.start(10.0)
        (process,) = helpers._processes
        process.join(60)
        assert process.exitcode == 0 and time.monotonic() - start < 45
    study = open_study(request, evaluator_for(request).fingerprint)
    assert study.trials and not [t for t in study.trials if t.state.name == "RUNNING"]
