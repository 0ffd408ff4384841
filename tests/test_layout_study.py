"""The layout study: which layouts, what is recorded of them, and what the page says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.layout_study import render
from benchmarks.layouts import grid
from benchmarks.layouts.document import document, name, plots
from benchmarks.layouts.grid import bytes_needed, layouts, study_problem
from benchmarks.layouts.run import study
from tuner.space.plan import DecodePlan
from tuner.targets import get_target

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("head_dim", [128, 256, 512])
@pytest.mark.parametrize("op", ["decode", "dequant"])
def test_layouts_cover_warps_splits_and_rows(op: str, head_dim: int) -> None:
    found = layouts(*study_problem(op, head_dim), get_target("sm_90"))
    assert len({x.config for x in found}) == len(found) > 50
    assert {x.warps for x in found} == set(grid.AXES[op]["warps"])
    assert len({x.split for x in found}) >= 3 and len({x.rows_in_flight for x in found}) >= 3
    fixed = {n: {x.config[n] for x in found} for n, _ in found[0].config.params if n not in grid.AXES[op]}
    assert all(len(values) == 1 for values in fixed.values())
    assert {x.warps for x in found[:6]} == set(grid.AXES[op]["warps"])  # a study may end early
    if op == "decode":
        for x in found:
            plan = DecodePlan(x.config)
            assert x.split.startswith(f"heads {x.config['head_warps']} x tokens {plan.token_warps} x")


def test_bytes_needed_follow_littles_law() -> None:
    # 4300 GB/s x 0.8 us over 132 SMs
    assert bytes_needed(get_target("sm_90")) == pytest.approx(4300e9 * 0.8e-6 / 132)


# --- the page ---------------------------------------------------------------------------------------------------------


def row(warps: int, split: str, rows: int, **times: float) -> dict[str, Any]:
    return {
        "warps": warps, "split": split, "rows_in_flight": rows, "params": {}, "registers": 64, "spill_bytes": 0,
        "shared_bytes": 2048, "resident_warps": 16, "bytes_in_flight_per_sm": 40_000.0, "times_us": times,
        "bottlenecks": dict.fromkeys(times, "memory"),
    }  # fmt: skip


def example(op: str = "decode", evidence: str = "measured") -> dict[str, Any]:
    return {
        "op": op, "head_dim": 256, "q_heads": 16, "kv_heads": 2, "cache_format": "turboquant_4bit_nc",
        "evidence": evidence, "device": {"name": "NVIDIA H200", "arch": "sm_90"},
        "provenance": {"date": "2026-01-02T03:04:05Z"}, "max_warps": 64, "bytes_needed_per_sm": 20_000.0,
        "limits_us": {"b1_c4096": 10.0, "b128_c8192": 100.0},
        "buckets": {"b1_c4096": [1, 4096], "b128_c8192": [128, 8192]}, "layouts_allowed": 5,
        "layouts": [
            row(1, "1 heads", 16, b1_c4096=40.0, b128_c8192=125.0),
            row(4, "1 heads", 16, b1_c4096=20.0, b128_c8192=160.0),
            row(4, "2 heads", 32, b1_c4096=25.0, b128_c8192=150.0),
            row(8, "2 heads", 32, b1_c4096=20.0, b128_c8192=125.0),
            {"warps": 16, "split": "2 heads", "rows_in_flight": 32, "params": {}, "failure": "resource: registers"},
        ],
    }  # fmt: skip


def test_the_page_says_what_wins_and_why() -> None:
    found = example()
    page = document([found, example("dequant", "predicted")], {name(found): ["layout-study/plot.svg"]})
    overview = next(line for line in page.splitlines() if line.startswith("| decode | 256"))
    # 8 warps: 2 x and 1.25 x the limit, in the mean 1.58; the better of the 4-warp layouts: 2 x and 1.6 x, 1.79.
    assert "8 warps: 2 heads, 32 rows | 63% | 1 of 4 | 4 warps: 1 heads, 16 rows | 13.1%" in overview
    short = next(line for line in page.splitlines() if line.startswith("| 1 | 4k |"))
    assert "4 warps: 1 heads" in short and "50%" in short and "16/64" in short and "2.0 x" in short
    assert "1.00 x" in short and "memory" in short
    long = next(line for line in page.splitlines() if line.startswith("| 128 | 8k |"))
    assert "1 warp: 1 heads" in long and "80%" in long and "1.20 x" in long
    # The best quarter is the one layout at 1.58 times the limit, the worst the one at 2.24, 41% slower.
    assert "grows by 41%" in page and "| best | 63% | 8 | 32 |" in page and "| worst | 45% | 1 | 16 |" in page
    assert "1 of them failed (resource)" in page and "![layout-study/plot.svg](layout-study/plot.svg)" in page
    assert page.count("Predicted, 2026-01-02") == 1 and page.count("Measured, 2026-01-02") == 1
    none = example()
    none["layouts"] = none["layouts"][-1:]
    assert "None ran." in document([none], {})


def test_plots_stand_alone() -> None:
    files = plots(example())
    assert set(files) == {"decode-d256-NVIDIA_H200-warps.svg", "decode-d256-NVIDIA_H200-rows-in-flight.svg"}
    for text in files.values():
        svg = ElementTree.fromstring(text)
        assert svg.tag == "{http://www.w3.org/2000/svg}svg" and "href" not in text
        assert text.count("<polyline") == 2 and "1 x 4k" in text and "measured" in text


def test_rendering_needs_only_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "layout-study"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(example()))
    page = render(folder)
    assert page == tmp_path / "layout-study.md"
    for line in page.read_text().splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("](")[2].rstrip(")")).is_file()


def test_rendering_keeps_the_conclusions(tmp_path: Path) -> None:
    """They are written by hand, after the overview."""
    folder = tmp_path / "layout-study"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(example()))
    page = render(folder)
    without = page.read_text()
    first = without.index("## decode, ")
    page.write_text(without[:first] + "## Conclusions\n\nSixteen warps win.\n\n" + without[first:])
    with_them = page.read_text()
    (folder / "b.json").write_text(json.dumps(example()))
    assert render(folder).read_text().count("Sixteen warps win.") == 1
    (folder / "b.json").unlink()
    assert render(folder).read_text() == with_them


@pytest.mark.parametrize(
    ("args", "word"), [("--op store", "store"), ("--head-dim 100", "100"), ("--head-dim x", "'x'")]
)
def test_bad_usage_is_one_line(args: str, word: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "layout_study.py"),
        *args.split(),
        "--data",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and word in done.stderr
    assert not any(tmp_path.iterdir())


# --- a study, predicted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode", "dequant"])
def test_a_predicted_study_is_recorded_whole(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {n: values[:1] for n, values in grid.AXES[op].items()} | {"warps": (1, 4)}
    monkeypatch.setitem(grid.AXES, op, few)
    told: list[str] = []
    found = study(op, 64, get_target("sm_121"), "predicted", 200, tmp_path, 0, told.append)
    assert [r["warps"] for r in found["layouts"]] == [1, 4] and found["layouts_allowed"] == 2
    for recorded in found["layouts"]:
        assert recorded["times_us"].keys() == found["limits_us"].keys() == recorded["bottlenecks"].keys()
        assert all(t > found["limits_us"][b] for b, t in recorded["times_us"].items())
        assert recorded["bytes_in_flight_per_sm"] > 0 and 0 < recorded["resident_warps"] <= 48
    assert found["evidence"] == "predicted" and "2 of 2 layouts" in told[-1]
    assert "None ran" not in document([json.loads(json.dumps(found))], {})


def test_time_ends_a_study_after_its_first_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {n: values[:1] for n, values in grid.AXES["dequant"].items()} | {"warps": (1, 4)}
    monkeypatch.setitem(grid.AXES, "dequant", few)
    found = study("dequant", 64, get_target("sm_121"), "predicted", 0.01, tmp_path, 0, lambda text: None)
    assert len(found["layouts"]) == 1 and found["layouts_allowed"] == 2
