"""The release steps: their order, what is done once, what is left over; and which kernels the sanitizers are given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
from command_line import ROOT, make_table

from benchmarks import command, release, sanitize
from benchmarks.release import STEPS, Step, argv, carry_out, chosen, publish
from tuner.cli.tune import command as tune_command
from tuner.errors import TunerError, UsageError
from tuner.table import read, verify
from tuner.table.store import FOLDER_VARIABLE, PACKAGE_TABLES


def step(name: str, code: str, seconds: float = 60) -> Step:
    return Step(name, "group", ("-c", code), seconds)


def test_steps_that_are_done_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    good, bad = step("good", f"{mark}; print('fine')"), step("bad", "raise SystemExit('no')")
    assert carry_out([good, bad], tmp_path / "work", 60) == ["bad"]
    assert carry_out([good, bad], tmp_path / "work", 60) == ["bad"]
    assert (tmp_path / "ran").read_text() == "x"
    assert list(json.loads((tmp_path / "work/done.json").read_text())) == ["good"]
    assert carry_out([good], tmp_path / "work", 60, again=True) == [] and (tmp_path / "ran").read_text() == "xx"
    said = capsys.readouterr().out
    assert "good: done after" in said and "    fine" in said and "bad: ended with 1" in said and "done before" in said


def test_time_ends_a_step_and_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "_LEAST_S", 0.5)
    slow, next_ = step("slow", "import time; time.sleep(60)", seconds=1), step("next", "pass")
    assert carry_out([slow, next_], tmp_path, 20) == ["slow"]
    assert carry_out([slow, step("later", "pass")], tmp_path / "b", 1.2) == ["slow", "later"]


def test_gpus_share_the_steps_and_wait_for_what_comes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that wait for each other run at the same time, each with a GPU of its own; one that comes after a group waits
    for all of it, though some of it failed.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # where there is a GPU, this process has one of its own
    (tmp_path / "met").mkdir()
    code = (
        "import os, sys, time; from pathlib import Path; folder = Path({folder!r})\n"
        "(folder / os.environ['CUDA_VISIBLE_DEVICES']).touch(); end = time.monotonic() + 30\n"
        "while len(list(folder.iterdir())) < 2 and time.monotonic() < end: time.sleep(0.05)\n"
        "sys.exit(0 if len(list(folder.iterdir())) == 2 else 3)"
    ).format(folder=str(tmp_path / "met"))
    seen = f"import os; assert sorted(os.listdir({str(tmp_path / 'met')!r})) == ['4', '7']"
    last = replace(step("last", seen), group="more", after=("group",))
    bad = step("bad", "raise SystemExit(1)")
    steps = [last, step("a", code), step("b", code), bad]
    assert carry_out(steps, tmp_path / "work", 90, gpus=("4", "7")) == ["bad"]
    assert set(json.loads((tmp_path / "work/done.json").read_text())) == {"last", "a", "b"}


def test_cores_are_divided_among_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = (
        "import os, time; from pathlib import Path; cores = sorted(os.sched_getaffinity(0))\n"
        f"(Path({str(tmp_path)!r}) / os.environ['CUDA_VISIBLE_DEVICES']).write_text(repr(cores)); time.sleep(1)"
    )
    before = os.sched_getaffinity(0)
    assert carry_out([step("a", code), step("b", code)], tmp_path / "work", 60, gpus=("0", "1")) == []
    found = [set(json.loads((tmp_path / gpu).read_text())) for gpu in "01"]
    assert found == [release.share_of_cores(0, 2), release.share_of_cores(1, 2)]
    assert found[0] | found[1] == before == os.sched_getaffinity(0)
    assert len(before) < 2 or not found[0] & found[1]
    assert all(release.share_of_cores(n, 2 * len(before)) <= before for n in range(2 * len(before)))


def test_a_fault_of_ours_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that wait for a step's end do not wait for ever where that step never began."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # there is no second one
    steps = [step("a", "pass"), replace(step("last", "pass"), group="more", after=("group",))]
    with pytest.raises(IndexError):
        carry_out(steps, tmp_path / "work", 60, gpus=("1", "2"))


@pytest.mark.parametrize(("ours", "expected"), [(None, "1"), ("", "1"), ("2,3", "3"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_step_sees_one_of_the_gpus_that_are_seen_here(
    ours: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if ours is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    assert release.environment(STEPS[0], Path(), "1")["CUDA_VISIBLE_DEVICES"] == expected


def test_an_order_of_all_steps_exists() -> None:
    line, taken = release.Line(STEPS), list[Step]()
    while (one := line.take()) is not None:
        assert not [s for s in STEPS if s not in taken and (s.name in one.after or (s.group in one.after and s != one))]
        taken.append(one)
        line.end(one)
    assert sorted(s.name for s in taken) == sorted(s.name for s in STEPS)
    known = {n for s in STEPS for n in (s.name, s.group)}
    assert all(n in known for s in STEPS for n in s.after)


def test_what_a_step_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ignores interrupts goes too, and one that can clean up has the time to."""
    monkeypatch.setattr(command, "_STOP_S", 1.0)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)"
        "\np.stdout.readline(); print(p.pid, flush=True)"
        "\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('cleaned up', flush=True)"
    )
    log = tmp_path / "log"
    with log.open("w") as file:
        assert command.run_bounded([sys.executable, "-c", code], file, 3.0) is None
    pid, said = log.read_text().split("\n", 1)
    assert said == "cleaned up\n"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and lives(int(pid)):
        time.sleep(0.05)
    assert not lives(int(pid))


def test_another_thread_can_stop_what_runs(tmp_path: Path) -> None:
    stop, start = threading.Event(), time.monotonic()
    threading.Timer(1.0, stop.set).start()
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with (tmp_path / "log").open("w") as file:
        assert command.run_bounded([sys.executable, "-c", code], file, 50.0, stop=stop) is None
        assert command.run_bounded([sys.executable, "-c", "pass"], file, 50.0, stop=threading.Event()) == 0
    assert time.monotonic() - start < 10 and not lives(int((tmp_path / "log").read_text()))


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_benchmarks_run_the_new_tables(tmp_path: Path) -> None:
    for one in STEPS:
        folder = release.environment(one, tmp_path).get(FOLDER_VARIABLE)
        named = str(tmp_path / "tables") in argv(one, tmp_path)
        tunes_no_table = one.group in ("tests", "layouts")
        assert named or tunes_no_table or folder == str(tmp_path / "tables"), one.name


def test_only_takes_steps_and_groups() -> None:
    grid = [f"grid-{n}" for n in (1, 2, 3, 4)]
    assert [s.name for s in chosen(STEPS, "grid")] == [*grid, "grid", "grid-formats"]
    assert [s.name for s in chosen(STEPS, "tune-store-d128,engine")] == ["tune-store-d128", "engine"]
    assert chosen(STEPS, "") == list(STEPS) and len({s.name for s in STEPS}) == len(STEPS)
    with pytest.raises(UsageError, match="nonsense"):
        chosen(STEPS, "nonsense")


def test_every_step_is_a_command_that_there_is(tmp_path: Path) -> None:
    known = {option for parameter in tune_command.params for option in parameter.opts}

    @cache
    def helped(*words: str) -> str:
        command = [sys.executable, ROOT / words[0], *words[1:], "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for one in STEPS:
        words = argv(one, tmp_path)[1:]
        assert not [w for w in words if w in ("TABLES", "RECORDINGS", "WORK") or w.startswith("WORK/")]
        if words[0] == "-m":
            continue
        assert (ROOT / words[0]).is_file()
        options = {w for w in words if w.startswith("--")}
        if words[0] == "tune.py" and words[1] != "bench":
            assert options <= known
        else:
            verb = ["bench"] if words[1] == "bench" else []
            assert not [o for o in options if o not in helped(words[0], *verb)], one.name


def test_new_tables_replace_those_of_their_names_and_leave_no_cubin_behind(tmp_path: Path) -> None:
    old = make_table(tmp_path / "package")
    stray = tmp_path / "package" / "kernels" / "sm_121-0123456789abcdef.cubin"
    stray.write_bytes(b"of a table that was replaced")
    new = make_table(tmp_path / "new", context=65536)
    (written,) = publish(tmp_path / "new", tmp_path / "package")
    assert written == old and read(written) == read(new) and verify(written) == () and not stray.exists()


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
    tool, guilty = tmp_path / "sanitizer", group[1]
    plain = next(s for s in subjects if not s.needs_twin and s is not guilty)
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nfound = {str(guilty.cubin)!r} in sys.argv\n"
        "print('========= Invalid read' * found)\n"
        "print('========= ERROR SUMMARY:', int(found), 'errors')\nsys.exit(9 * found)\n"
    )
    tool.chmod(0o755)
    found = sanitize.examine_all([(group, "memcheck"), ([plain], "racecheck")], str(tool), tmp_path / "w", 2, 60)
    assert found == ["FOUND" if s is guilty else "clean" for s in group] + ["clean"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(group) + 2
    at = lines.index(f"FOUND memcheck  {guilty.name}: 1 errors")
    assert lines[at + 1] == "    Invalid read" and sum(line.startswith("FOUND") for line in lines) == 1
    assert sanitize.examine_all([(group, "memcheck")], str(tool), tmp_path / "w", 1, 0) == []


@pytest.mark.parametrize(("status", "word"), [(9, "FOUND"), (0, "clean")])
def test_kernels_that_need_twins_are_unsure_and_their_twins_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, word: str
) -> None:
    subjects = package_subjects()
    sliced = next(s for s in subjects if s.needs_twin)
    whole = next(s for s in subjects if not s.needs_twin)
    tool = tmp_path / "sanitizer"
    tool.write_text(f"#!{sys.executable}\nprint('========= RACECHECK SUMMARY: 3')\nraise SystemExit({status})\n")
    tool.chmod(0o755)
    paired = replace(sliced, twin=True)
    asked = [([sliced], "racecheck"), ([sliced], "memcheck"), ([whole], "racecheck"), ([paired], "racecheck")]
    expected = ["unsure", word, word, word]
    assert sanitize.examine_all(asked, str(tool), tmp_path, 1, 60) == expected
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == expected


def test_racecheck_that_loses_count_of_barriers_is_unsure(tmp_path: Path) -> None:
    subject = package_subjects()[0]
    tool = tmp_path / "sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nprint('========= Warning: Detected overflow of tracked cuda::barrier structures. Results "
        "might be incorrect. Try using --num-cuda-barriers to fix the issue')\n"
    )
    tool.chmod(0o755)
    found = sanitize.examine_all([([subject], "racecheck"), ([subject], "memcheck")], str(tool), tmp_path / "w", 1, 60)
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
    tool = tmp_path / "sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit({TOLD | answers}[sys.argv[-2]][int(sys.argv[-1])])\n")
    tool.chmod(0o755)
    if expected:
        assert sanitize.follows_twins(str(tool), "sm_90", tmp_path / "work") == expected.startswith("tells")
        assert capsys.readouterr().out == f"control: racecheck {expected}\n"
    else:
        with pytest.raises(TunerError, match=r"does not tell races in sanitize_control\.cu, or could not run it"):
            sanitize.follows_twins(str(tool), "sm_90", tmp_path / "work")
    assert (tmp_path / "work" / "control").is_file()


@pytest.mark.parametrize("name", ["release.py", "sanitize.py"])
def test_without_a_gpu_one_line_says_so(name: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is what happens without one")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU 0") and not any(tmp_path.iterdir())
