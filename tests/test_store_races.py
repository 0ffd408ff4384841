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
from store_emulated import with_quotients_before_a_half

from tuner.check_store import StoreCase, store_case
from tuner.emulate import EmulationError
from tuner.render import render
from tuner.space import Config, Problem, default_config

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder_for_races(tmp_path_factory)


AHEAD = default_config(Problem("store", 128, 1, "turboquant_4bit_nc")).with_(store="ahead", passes=2)
COPIED = AHEAD.with_(sides="copied", rows=2, chunks=2, transform="tensor", search="packed")
TWO = COPIED.with_(rows=1, passes=4, chunks=4, transform="quads", loop="two")


def adjacent_case(config: Config) -> StoreCase:
    """Slots side by side; two tokens with values that the short loop leaves to the other."""
    case = store_case(config.problem, 37, kv_heads=4)
    value = case.value.clone()
    value[20:22] = with_quotients_before_a_half(value[20:22], config.problem.layout.format.value_bits)
    return replace(case, slot_mapping=torch.arange(3, 40, dtype=torch.int32), value=value)


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize(
    "config",
    [AHEAD.with_(store="staged", store_bytes=16), AHEAD, COPIED, TWO, TWO.with_(rows=2, passes=2)],
    ids=["staged", "ahead", "copied", "two loops", "two loops, two passes ahead"],
)
def test_store_has_no_races(root, config, adjacent):
    case = adjacent_case(config) if adjacent else store_case(config.problem, 37, kv_heads=4)
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
    (TWO, r"cp_async_wait<0>\(\);(?=\n.*begin\(keys)"),
    (TWO.with_(rows=2, passes=2), r"(?<=SIDE\);\n)\s*cp_async_wait<0>\(\);"),
]


@pytest.mark.parametrize(("config", "barrier"), BARRIERS)
def test_a_store_without_one_of_its_barriers_races(root, monkeypatch, config, barrier):
    mutant, count = re.subn(barrier, "", render(config).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    case = adjacent_case(config)
    with pytest.raises(EmulationError, match="data race in shared memory"):
        emulate_store(config, case.before.clone(), case, seed=1, races=True, root=root)
