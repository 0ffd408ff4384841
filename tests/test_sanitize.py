"""Which kernels the sanitizers are given, what is said of them, and what is not asked again. Scripts stand in the
sanitizer's place, which needs a GPU."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
from command_line import make_table

from benchmarks import command, sanitize
from benchmarks.sanitize import CLEAN, FOUND, TOOLS, Judged, Subject
from tuner.errors import TunerError
from tuner.table.store import PACKAGE_TABLES


def stand_in(folder: Path, code: str) -> str:
    """A program in the sanitizer's place."""
    tool = folder / "sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    tool.chmod(0o755)
    return str(tool)


def judged_in(folder: Path) -> Judged:
    return Judged(folder / "clean.jsonl", "1")


def test_sanitizers_get_the_kernels_of_the_attached_gpu(tmp_path: Path) -> None:
    make_table(tmp_path)
    (subject,) = sanitize.subjects(tmp_path, "sm_121")
    assert list(sanitize.subjects(tmp_path, "sm_90")) == []
    words = sanitize.command("racecheck", "/bin/compute-sanitizer", [subject])
    assert words[:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"] and words[-2:] == [str(subject.cubin), "8"]
    kind, config = words[words.index("--child") + 1], json.loads(words[words.index("--child") + 2])
    assert kind == "kernel" and config["head_dim"] == 128 and config["params"] == dict(subject.kernel.params)
    text = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitize.summary(f"noise\n{text}\n") == "0 hazards displayed (0 errors, 0 warnings)"
    assert sanitize.summary("crashed") == "no summary"


def test_the_first_report_of_a_sanitizer_is_told() -> None:
    race = "========= Error: Race reported between Write access at wph_decode+0x10\n=========     and Read access at +8"
    more = "========= Warning: Race reported between Read access\n"
    assert sanitize.first_report(f"========= COMPUTE-SANITIZER\n{race}\n=========\n{more}") == [
        "    Error: Race reported between Write access at wph_decode+0x10",
        "    and Read access at +8",
    ]
    assert sanitize.first_report("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == []


@cache
def package_subjects() -> list[sanitize.Subject]:
    return list(sanitize.subjects(PACKAGE_TABLES, "sm_90"))


def test_a_kernel_that_is_reported_is_told_apart_from_those_it_ran_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a program in the sanitizer's place that reports one of the cubins it is given."""
    subjects = package_subjects()
    parts = list(sanitize.groups(subjects))
    assert [s for part in parts for s in part] == subjects and max(map(len, parts)) == 5
    assert all(len({s.table.file_name for s in part}) == 1 for part in parts)
    group = next(part for part in parts if len(part) >= 3)
    guilty = group[1]
    plain = next(s for s in subjects if not s.needs_twin and s is not guilty)
    tool = stand_in(
        tmp_path,
        f"found = {str(guilty.cubin)!r} in sys.argv\nprint('========= Invalid read' * found)\n"
        "print('========= ERROR SUMMARY:', int(found), 'errors')\nsys.exit(9 * found)",
    )
    asked = [(group, "memcheck"), ([plain], "racecheck")]
    found = sanitize.examine_all(asked, tool, tmp_path / "w", 2, 60, judged_in(tmp_path))
    assert found == ["FOUND" if s is guilty else "clean" for s in group] + ["clean"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(group) + 2
    at = lines.index(f"FOUND memcheck  {guilty.name}: 1 errors")
    assert lines[at + 1] == "    Invalid read" and sum(line.startswith("FOUND") for line in lines) == 1
    assert sanitize.examine_all([(group, "memcheck")], tool, tmp_path / "w", 1, 0, judged_in(tmp_path)) == []


@pytest.mark.parametrize(("status", "word"), [(9, "FOUND"), (0, "clean")])
def test_kernels_that_need_twins_are_unsure_and_their_twins_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, word: str
) -> None:
    subjects = package_subjects()
    sliced = next(s for s in subjects if s.needs_twin)
    whole = next(s for s in subjects if not s.needs_twin)
    tool = stand_in(tmp_path, f"print('========= RACECHECK SUMMARY: 3')\nsys.exit({status})")
    paired = replace(sliced, twin="digest")
    asked = [([sliced], "racecheck"), ([sliced], "memcheck"), ([whole], "racecheck"), ([paired], "racecheck")]
    expected = ["unsure", word, word, word]
    assert sanitize.examine_all(asked, tool, tmp_path, 1, 60, judged_in(tmp_path)) == expected
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == expected


def test_racecheck_that_loses_count_of_barriers_is_unsure(tmp_path: Path) -> None:
    subject = package_subjects()[0]
    tool = stand_in(
        tmp_path,
        "print('========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be incorrect. "
        "Try using --num-cuda-barriers to fix the issue')",
    )
    asked = [([subject], "racecheck"), ([subject], "memcheck")]
    found = sanitize.examine_all(asked, tool, tmp_path / "w", 1, 60, judged_in(tmp_path))
    assert found == ["unsure", "clean"]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The control's program, compiled where no sanitizer can be asked about it."""
    folder = tmp_path_factory.mktemp("control")
    with pytest.raises(TunerError, match="could not run it"):
        sanitize.follows_twins("/bin/false", "sm_90", folder)
    return folder / "control"


TOLD = {"cta": (0, 9), "pairs": (0, 9, 9, 9), "turns": (0, 9, 9), "lanes": (0,)}
STORED = "in what a cluster's CTAs store in each other's shared memory"
OWN = "where kernels' own ways have none"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, f"tells races of twins, those too {STORED}"),
        ({"lanes": (1,)}, f"tells races of twins, those too {STORED}, could not be asked {OWN}"),
        ({"lanes": (9,)}, f"tells races of twins, those too {STORED}, reports some {OWN}"),
        ({"turns": (0, 9, 0)}, f"tells races of twins, but none {STORED}"),
        ({"turns": (0, 9, 1)}, f"tells races of twins, not asked about those {STORED}"),
        ({"pairs": (0, 0, 0, 0)}, "cannot tell races of twins"),
        ({"pairs": (9, 9, 9, 9)}, "cannot tell races of twins"),
        ({"pairs": (0, 9, 9, 0)}, "cannot tell races of twins"),
        ({"pairs": (1, 9, 9, 9)}, "cannot tell races of twins"),
        ({"turns": (9, 9, 9)}, "cannot tell races of twins"),
        ({"turns": (0, 0, 9)}, "cannot tell races of twins"),
        ({"cta": (1, 9)}, None),
        ({"cta": (0, 0)}, None),
        ({"cta": (9, 9)}, None),
    ],
)
def test_the_control_says_whether_racecheck_can_be_believed_about_twins(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    control: Path,
    answers: dict[str, tuple[int, ...]],
    expected: str | None,
) -> None:
    """The program is compiled once; a script stands in the sanitizer's place, which needs a GPU."""

    def run(words: list[str], log: IO[str], limit_s: float, **options: Any) -> int | None:
        if Path(words[0]).name != "nvcc":
            return command.run_bounded(words, log, limit_s, **options)
        shutil.copy(control, words[words.index("-o") + 1])
        return 0

    monkeypatch.setattr(sanitize, "run_bounded", run)
    tool = stand_in(tmp_path, f"sys.exit({TOLD | answers}[sys.argv[-2]][int(sys.argv[-1])])")
    if expected:
        assert sanitize.follows_twins(tool, "sm_90", tmp_path / "work") == expected.startswith("tells")
        assert capsys.readouterr().out == f"control: racecheck {expected}\n"
    else:
        with pytest.raises(TunerError, match=r"does not tell races in sanitize_control\.cu, or could not run it"):
            sanitize.follows_twins(tool, "sm_90", tmp_path / "work")
    assert (tmp_path / "work" / "control").is_file()


@pytest.fixture(scope="module")
def kernels() -> list[Subject]:
    """Of two tables."""
    found = package_subjects()
    some = list(dict.fromkeys(s.table.file_name for s in found))[:2]
    return [s for s in found if s.table.file_name in some]


def names(asked: list[tuple[list[Subject], str]]) -> set[tuple[str, str]]:
    return {(subject.kernel.id, tool) for group, tool in asked for subject in group}


def test_the_same_command_goes_on_with_what_was_not_clean(tmp_path: Path, kernels: list[Subject]) -> None:
    broken = kernels[1]
    sanitizer = stand_in(
        tmp_path,
        "if sys.argv[1] == '--version':\n    sys.exit(print('NVIDIA (R) Compute Sanitizer\\nVersion 1'))\n"
        f"found = {str(broken.cubin)!r} in sys.argv\n"
        "print('========= ERROR SUMMARY:', int(found), 'errors')\nsys.exit(9 * found)",
    )
    path, version = tmp_path / "clean.jsonl", sanitize.version_of(sanitizer)
    assert version == "NVIDIA (R) Compute Sanitizer Version 1"
    judged = Judged(path, version)
    asked = sanitize.open_questions({tool: kernels for tool in TOOLS}, judged)
    everything = {(s.kernel.id, tool) for s in kernels for tool in TOOLS}
    assert names(asked) == everything and all(len({s.table.file_name for s in group}) == 1 for group, _ in asked)

    twins = [replace(s, twin="digest") for s in kernels]  # without them racecheck's word would not count for all
    every = {"memcheck": kernels, "racecheck": twins}
    asked = sanitize.open_questions(every, judged)
    words = sanitize.examine_all(asked, sanitizer, tmp_path / "logs", 2, 60.0, judged)
    assert words.count(FOUND) == 2 and words.count(CLEAN) == len(everything) - 2

    again = Judged(path, version)
    assert names(sanitize.open_questions(every, again)) == {(broken.kernel.id, tool) for tool in TOOLS}
    for others in (kernels, [replace(s, twin="another digest") for s in kernels]):
        assert len(names(sanitize.open_questions({"racecheck": others}, again))) == len(kernels)
    assert names(sanitize.open_questions(every, Judged(path, "Version 2"))) == everything


def test_a_line_that_was_being_written_counts_for_nothing(tmp_path: Path, kernels: list[Subject]) -> None:
    path = tmp_path / "clean.jsonl"
    for subject in kernels[:2]:
        Judged(path, "1").add("memcheck", subject)
    path.write_text(path.read_text()[:-9])
    judged = Judged(path, "1")
    assert [judged.is_clean("memcheck", s) for s in kernels[:2]] == [True, False]
    judged.add("memcheck", kernels[1])
    assert all(Judged(path, "1").is_clean("memcheck", s) for s in kernels[:2])
