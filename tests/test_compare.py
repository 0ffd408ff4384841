"""Comparing the values of an axis: equal shares of one study, one race, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from analytic_search import BUCKETS, Analytic, request_for
from command_line import tune
from rich.console import Console

from tuner.errors import TunerError
from tuner.report import terminal
from tuner.report.layouts import layout_rows
from tuner.search import Candidate, Failure
from tuner.search.compare import Comparison, compare, comparison_buckets
from tuner.search.request import OnEvent, Progress
from tuner.space import Config


class NoSixteen(Analytic):
    """Sixteen warps never compile; eight pass the quick gate and fail the full one but in their second-best kernel."""

    def _build(self, config: Config) -> Candidate | Failure:
        return Failure("compile", "too much") if config["warps"] == 16 else super()._build(config)

    def confirm(self, candidate: Candidate) -> Failure | None:
        if candidate.config["warps"] == 8 and not self.confirmed:
            self.confirmed.append(candidate.config)
            return Failure("wrong result", "off by one")
        return None

    confirmed: list[Config]


def compared(
    root: Path, evaluator: Analytic | None = None, on_event: OnEvent | None = None, **changes: object
) -> tuple[Comparison, Analytic]:
    evaluator = evaluator or Analytic(root)
    request = replace(request_for(root, restrict={"warps": (1, 4, 8)}, trials=12), **changes)  # type: ignore[arg-type]
    return compare(request, "warps", on_event, evaluator), evaluator


def test_every_value_gets_its_share_and_its_best_kernel_races(tmp_path: Path) -> None:
    found, evaluator = compared(tmp_path)
    tried = [c["warps"] for c in evaluator.scored()]
    assert [tried.count(w) for w in (1, 4, 8)] == [4, 4, 4] and len(tried) == 12
    assert [c.value for c in found.contenders] == [1, 4, 8] and not found.missing
    assert set(found.raced) == {b.key for b in BUCKETS} and len(evaluator.shares_s) == len(BUCKETS)
    for contender in found.contenders:
        config = contender.candidate.config
        assert config["warps"] == contender.value and contender.tried == 4
        own = [c for c in evaluator.scored() if c["warps"] == contender.value]
        for bucket in BUCKETS:
            us = contender.times[bucket.key].median_us
            assert us == evaluator.time(config, bucket, contender.splits[bucket.key]).median_us
        total = {c: sum(evaluator.time(c, b, 1).median_us / found.limits_us[b.key] for b in BUCKETS) for c in own}
        assert config in sorted(total, key=lambda c: total[c])[:2]
    again, later = compared(tmp_path)
    assert later.scored() == [] and [c.candidate.config for c in again.contenders] == [
        c.candidate.config for c in found.contenders
    ]


def test_the_default_and_the_seeds_layout_come_first_at_every_value(tmp_path: Path) -> None:
    _, evaluator = compared(tmp_path)
    for warps in (1, 4, 8):
        first = next(c for c in evaluator.scored() if c["warps"] == warps)
        assert first["load"] == "cp_async" and first["stages"] == 2  # the default configuration but for its warps


def test_progress_counts_all_values_together_and_goes_on(tmp_path: Path) -> None:
    seen: list[Progress] = []
    compared(tmp_path, on_event=lambda e: seen.append(e.progress), trials=9)
    compared(tmp_path, on_event=lambda e: seen.append(e.progress), trials=12)
    done = [p.done for p in seen]
    assert done == sorted(done) and done[0] == 1 and done[-1] == seen[-1].total == 12
    assert all(p.time_left_s is None or p.time_left_s >= 0 for p in seen)


def test_a_value_without_a_kernel_is_named_and_the_full_gate_decides(tmp_path: Path) -> None:
    evaluator = NoSixteen(tmp_path)
    evaluator.confirmed = []
    found, _ = compared(tmp_path, evaluator, restrict={"warps": (8, 16)}, trials=8)
    assert found.missing == {16: "too much"}
    (eight,) = found.contenders
    assert evaluator.confirmed and eight.candidate.config != evaluator.confirmed[0]
    with pytest.raises(TunerError, match=r"no value of warps has a kernel that runs: too much"):
        compared(tmp_path / "alone", NoSixteen(tmp_path / "alone"), restrict={"warps": (16,)}, trials=4)


def test_times_end_a_value_but_never_before_its_first_kernel(tmp_path: Path) -> None:
    found, evaluator = compared(tmp_path, Analytic(tmp_path, pause_s=0.2), trials=3000, timeout_s=0.6)
    assert [c.value for c in found.contenders] == [1, 4, 8]
    assert len(evaluator.scored()) < 60


def test_the_report_and_the_file_say_the_same(tmp_path: Path) -> None:
    found, _ = compared(tmp_path)
    rows = layout_rows(found)
    assert min(r.behind for r in rows) >= 1 and all(0 < r.limit_share < 1 for r in rows)
    assert all(r.triton_ratio == pytest.approx(10 / r.behind) for r in rows)  # it takes ten times the fastest's time
    data = json.loads(found.save(tmp_path / "out").read_text())
    assert data["axis"] == "warps" and data["evidence"] == "predicted" and len(data["contenders"]) == 3
    assert data["contenders"][0]["times_us"].keys() == data["limits_us"].keys()
    console = Console(width=160, record=True)
    console.print(terminal.layouts(rows, found))
    console.print(terminal.layout_times(rows, found))
    text = console.export_text()
    for row in rows:
        assert f"{row.behind:.3f}" in text and f"{row.limit_share:.0%}" in text
    assert "predicted" in text and "64k ragged" in text


@pytest.mark.parametrize("op", ["decode", "dequant"])
def test_buckets_of_a_comparison_are_few_and_of_both_kinds(op: str) -> None:
    buckets = comparison_buckets(op)
    assert len(buckets) <= 6 and {b.batch for b in buckets} >= {1, 8, 32, 128}
    assert any(b.ragged for b in buckets) == (op == "decode")


def test_the_command_compares_and_writes_no_table(tmp_path: Path) -> None:
    args = ("--head-dim", 64, "--arch", "sm_121", "--warps", "2,4", "--trials", 2, "--timeout", 60)
    done = tune(*args, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    path = tmp_path / lines[-1].removeprefix("comparison: ")
    assert [c["value"] for c in json.loads(path.read_text())["contenders"]] == [2, 4]
    assert "warps per CTA compared" in done.stdout and "at most 60 s of search" in done.stdout
    assert sum(bool(re.search(r"\d \(\d+%\)", line)) for line in lines) == len(comparison_buckets("decode"))
    assert not list(tmp_path.rglob("turboquant_*.json"))
