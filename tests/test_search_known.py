"""What won before: kernels of dispatch tables that a search tries first."""

from __future__ import annotations

from pathlib import Path

import pytest
from analytic_search import PROBLEM, SHAPE, TARGET, search

from tuner.formats import VLLM_PRESETS
from tuner.search.constraints import space_for
from tuner.search.known import winners_elsewhere, winners_here
from tuner.space import Problem, default_config, get_space, seed_config
from tuner.table import find, read, table_file_name
from tuner.table.store import FOLDER_VARIABLE, PACKAGE_TABLES
from tuner.targets import get_target

H200 = get_target("sm_90").device_name


def test_they_come_after_the_landmarks_and_before_the_leads(tmp_path: Path) -> None:
    won = winners_here(PROBLEM, TARGET.device_name)
    _, evaluator, _ = search(tmp_path, trials=2 + len(won), batch_size=1)
    assert won and evaluator.scored() == [default_config(PROBLEM), seed_config(PROBLEM), *won]


def test_those_of_other_devices_come_last_and_only_what_the_target_takes(tmp_path: Path) -> None:
    space = space_for("decode", SHAPE.kv_heads)
    others = winners_elsewhere(PROBLEM, H200)
    taken = [c for c in others if not space.refusals(c, get_target("sm_90"))]
    leads = [c for c in space.leads(PROBLEM, SHAPE.kv_heads) if not space.refusals(c, get_target("sm_90"))]
    before = [default_config(PROBLEM), seed_config(PROBLEM), *winners_here(PROBLEM, H200), *leads]
    expected = list(dict.fromkeys([*before, *taken]))
    _, evaluator, _ = search(tmp_path, target=get_target("sm_90"), trials=len(expected), batch_size=1)
    assert taken and evaluator.scored() == expected


def test_the_most_used_come_first_and_each_once() -> None:
    path = find(PROBLEM, H200)
    assert path is not None
    table, won = read(path), winners_here(PROBLEM, H200)
    uses = [sum(e.kernel == k.id for e in (*table.by_batch, *table.by_batch_and_context)) for k in table.kernels]
    first = max(zip(uses, table.kernels, strict=True), key=lambda pair: pair[0])[1]
    assert 1 < len(set(won)) == len(won) <= 4 * len(table.kernels)
    assert won[0] == get_space("decode").renewed(first.config(PROBLEM))[0]
    others = winners_elsewhere(PROBLEM, H200)
    assert len(set(others)) == len(others) and set(others) >= set(winners_here(PROBLEM, "NVIDIA GB10"))


def test_every_kernel_is_tried_one_way_before_any_in_a_second() -> None:
    problem, space = Problem("decode", 128, 4, "turboquant_3bit_nc"), get_space("decode")
    path = find(problem, H200)
    assert path is not None
    ways = [space.renewed(kernel.config(problem)) for kernel in read(path, cubins=False).kernels]
    assert max(map(len, ways)) > 1
    firsts = {way[0] for way in ways}
    assert set(winners_here(problem, H200)[: len(firsts)]) == firsts


def test_what_won_before_is_tried_with_what_came_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table from before whole words were read, which its bulk copies allow."""
    problem = Problem("decode", 256, 8, "turboquant_4bit_nc")
    path = find(problem, H200)
    assert path is not None
    text, won = path.read_text(), winners_here(problem, H200)
    assert any(config["words"] == "whole_adjacent" for config in won)
    older = text.replace('"words": "whole_adjacent"', '"words": "adjacent"')
    assert older != text
    (tmp_path / path.name).write_text(older)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    table = read(tmp_path / path.name, cubins=False)
    assert not any(kernel.config(problem)["words"] == "whole_adjacent" for kernel in table.kernels)
    assert winners_here(problem, H200) == won


@pytest.mark.parametrize("cache_format", VLLM_PRESETS)
def test_what_won_before_squares_were_chained_is_tried_with_chains(cache_format: str) -> None:
    problem, space = Problem("decode", 128, 4, cache_format), get_space("decode")
    sums = [2, 1] if problem.layout.format.norm_correction else [1]
    path = find(problem, H200)
    assert path is not None
    for kernel in read(path, cubins=False).kernels:
        recorded = kernel.config(problem).with_(squares=1)
        ways = space.renewed(recorded)
        assert list(dict.fromkeys(way["squares"] for way in ways)) == sums, recorded.describe()
        refused = [space.refusals(way, get_target("sm_90")) for way in (recorded, *ways)]
        assert all(constraints == refused[0] for constraints in refused)


@pytest.mark.parametrize("damage", ["", "{", "cut"])
def test_a_damaged_table_or_none_is_no_obstacle(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = table_file_name(PROBLEM, TARGET.device_name)
    whole = (PACKAGE_TABLES / name).read_text()
    (tmp_path / name).write_text(whole[: len(whole) // 2] if damage == "cut" else damage)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert winners_here(PROBLEM, TARGET.device_name) == ()
    assert winners_here(Problem("decode", 64, 7, "turboquant_seed"), H200) == ()
    assert winners_elsewhere(Problem("decode", 64, 7, "turboquant_seed"), H200) == ()
