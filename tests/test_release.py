"""The release steps: their order, what is done once, what is left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from command_line import ROOT, make_table

from benchmarks import command, release
from benchmarks.release import STEPS, Step, argv, carry_out, chosen, publish
from tuner.cli.tune import command as tune_command
from tuner.errors import UsageError
from tuner.table import read, verify
from tuner.table.store import FOLDER_VARIABLE


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


@pytest.mark.parametrize("name", ["release.py", "sanitize.py"])
def test_without_a_gpu_one_line_says_so(name: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is what happens without one")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU 0") and not any(tmp_path.iterdir())
