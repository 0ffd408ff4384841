"""wph_store has no data races, and each of its barriers is needed for that."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import emulated
import pytest
import torch
from emulated import emulate_store, needs_gxx
from emulated_sources import folder_for_races

from tuner.check_store import store_case
from tuner.emulate import EmulationError
from tuner.render import render
from tuner.space import Problem, default_config

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder_for_races(tmp_path_factory)


AHEAD = default_config(Problem("store", 128, 1, "turboquant_4bit_nc")).with_(store="ahead", passes=2)
COPIED = AHEAD.with_(sides="copied", rows=2, chunks=2, transform="tensor", search="packed")
TWO = COPIED.with_(rows=1, passes=4, chunks=4, transform="quads", loop="two")


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize(
    "config",
    [AHEAD.with_(store="staged", store_bytes=16), AHEAD, COPIED, TWO],
    ids=["staged", "ahead", "copied", "two loops"],
)
def test_store_has_no_races(root, config, adjacent):
    case = store_case(config.problem, 37, kv_heads=4)
    if adjacent:
        case = replace(case, slot_mapping=torch.arange(3, 40, dtype=torch.int32))
    cache = case.before.clone()
    emulate_store(config, cache, case, seed=1, concurrent_ctas=2, races=True, root=root)
    assert (cache != case.before).any()


BARRIERS = [
    (COPIED, r"cp_async_wait<2 \* ROWS - 1>\(\);(?=  // the oldest)"),
    (COPIED, r"sync_warp\(\);(?=\n#pragma unroll\n.*SIZE / UNIT)"),
    (COPIED, r"sync_warp\(\);(?=  // the next rows reuse the buffer)"),
    (TWO, r"cp_async_wait<2 \* ROWS - 1>\(\);(?=  // the oldest)"),
    (TWO, r"cp_async_wait<2 \* ROWS - 1>\(\);(?=\s*value\.take)"),
    (TWO, r"sync_warp\(\);(?=\n#pragma unroll\n.*SIZE / UNIT)"),
    (TWO, r"sync_warp\(\);(?=  // the next rows reuse the buffer)"),
    (TWO, r"sync_warp\(\);(?=\n    }\n    WPH_DEVICE void multiply)"),
]


@pytest.mark.parametrize(("config", "barrier"), BARRIERS)
def test_a_store_without_one_of_its_barriers_races(root, monkeypatch, config, barrier):
    mutant, count = re.subn(barrier, "", render(config).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    case = replace(store_case(config.problem, 37, kv_heads=4), slot_mapping=torch.arange(3, 40, dtype=torch.int32))
    with pytest.raises(EmulationError, match="data race in shared memory"):
        emulate_store(config, case.before.clone(), case, seed=1, races=True, root=root)
