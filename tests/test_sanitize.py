"""What the sanitizers' command asks, and what not again. The sanitizer is a script here: the real one needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sanitize
from benchmarks.sanitize import CLEAN, FOUND, TOOLS, Judged, Subject
from tuner.table.store import PACKAGE_TABLES

_SANITIZER = """#!/bin/sh
if [ "$1" = --version ]; then printf 'NVIDIA (R) Compute Sanitizer\\nVersion 1\\n'; exit; fi
case "$*" in
*"$BROKEN"*) echo "========= ERROR SUMMARY: 1 error"; exit 9;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def sanitizer(tmp_path: Path) -> str:
    program = tmp_path / "compute-sanitizer"
    program.write_text(_SANITIZER)
    program.chmod(0o755)
    return str(program)


@pytest.fixture(scope="module")
def kernels() -> list[Subject]:
    """Of two tables."""
    found = [s for s in sanitize.subjects(PACKAGE_TABLES, "sm_90") if "H200" in s.table.device.name]
    first, second = list(dict.fromkeys(s.table.file_name for s in found))[:2]
    return [s for s in found if s.table.file_name in (first, second)]


def names(asked: list[tuple[list[Subject], str]]) -> set[tuple[str, str]]:
    return {(subject.kernel.id, tool) for group, tool in asked for subject in group}


def test_the_same_command_goes_on_with_what_was_not_clean(
    tmp_path: Path, sanitizer: str, kernels: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = kernels[1]
    monkeypatch.setenv("BROKEN", str(broken.cubin))
    every = {tool: kernels for tool in TOOLS}
    path, version = tmp_path / "clean.jsonl", sanitize.version_of(sanitizer)
    assert version == "NVIDIA (R) Compute Sanitizer Version 1"
    judged = Judged(path, version)
    asked = sanitize.open_questions(every, judged)
    everything = {(s.kernel.id, tool) for s in kernels for tool in TOOLS}
    assert names(asked) == everything and all(len({s.table.file_name for s in group}) == 1 for group, _ in asked)

    untwinned = [replace(s, twin="digest") for s in kernels]  # else racecheck's word would not count for all
    asked = sanitize.open_questions({"memcheck": kernels, "racecheck": untwinned}, judged)
    words = sanitize.examine_all(asked, sanitizer, tmp_path / "logs", 2, 60.0, judged)
    assert words.count(FOUND) == 2 and words.count(CLEAN) == len(everything) - 2

    again = Judged(path, version)
    twins = {"memcheck": kernels, "racecheck": untwinned}
    assert names(sanitize.open_questions(twins, again)) == {(broken.kernel.id, tool) for tool in TOOLS}
    for others in (kernels, [replace(s, twin="another digest") for s in kernels]):
        assert len(names(sanitize.open_questions({"racecheck": others}, again))) == len(kernels)
    assert names(sanitize.open_questions(twins, Judged(path, "Version 2"))) == everything


def test_a_line_that_was_being_written_counts_for_nothing(tmp_path: Path, kernels: list[Subject]) -> None:
    path = tmp_path / "clean.jsonl"
    for subject in kernels[:2]:
        Judged(path, "1").add("memcheck", subject)
    path.write_text(path.read_text()[:-9])
    judged = Judged(path, "1")
    assert [judged.is_clean("memcheck", s) for s in kernels[:2]] == [True, False]
    judged.add("memcheck", kernels[1])
    assert all(Judged(path, "1").is_clean("memcheck", s) for s in kernels[:2])
