"""An interrupt that arrives inside a callback, where Python ignores exceptions, still ends the program."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import signal, time, weakref
from tuner.interrupts import keep_interrupts

class Thing: pass

def interrupted(_):
    signal.raise_signal(signal.SIGINT)   # Ctrl-C, and the main thread is here

if {kept}:
    keep_interrupts()
for _ in range({times}):
    thing = Thing()
    reference = weakref.ref(thing, interrupted)
    try:
        del thing
        time.sleep(0.5)
    except KeyboardInterrupt:
        print("interrupted")
print("end")
"""


def run(*, kept: bool, times: int = 1) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(kept=kept, times=times)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_python_alone_loses_it() -> None:
    done = run(kept=False)
    assert done.stdout.split() == ["end"] and "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("times", [1, 3])
def test_it_is_raised_again_and_nothing_is_reported(times: int) -> None:
    done = run(kept=True, times=times)
    assert done.stdout.split() == ["interrupted"] * times + ["end"]
    assert done.stderr == ""


@pytest.mark.parametrize(("ending", "code"), [("", -signal.SIGALRM), ("let_go()", 0)])
def test_none_is_raised_again_once_the_interpreter_ends(ending: str, code: int) -> None:
    """Names with an underscore go first: an interrupt that is ignored then, and time for what would come of it."""
    program = f"""
import time
from tuner.interrupts import keep_interrupts, let_go
class Interrupted:
    def __del__(self): raise KeyboardInterrupt
class Slow:
    def __del__(self, sleep=time.sleep): sleep(0.2)
_first, last = Interrupted(), Slow()
keep_interrupts()
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stderr == ""


def test_other_ignored_exceptions_are_reported() -> None:
    program = """
from tuner.interrupts import keep_interrupts
class Thing:
    def __del__(self): raise ValueError("seen")
keep_interrupts()
del (thing := [Thing()])[0]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ValueError: seen" in done.stderr


def test_it_waits_for_calls_that_must_be_whole_but_not_for_ever() -> None:
    program = """
import signal, sys, time, types
from tuner import interrupts
interrupts.keep_interrupts()
interrupts.put_off_within("whole")
whole = types.ModuleType("whole.part")
exec('''
import time
def take(seconds, then):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    then.append("done")
''', whole.__dict__)
for seconds in (0.1, 60):
    happened, start = [], time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # arrives within
        whole.take(seconds, happened)
        time.sleep(5)
    except KeyboardInterrupt:
        print(happened, 0.02 < time.monotonic() - start < interrupts.LONGEST_S + 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["['done'] True", "[] True"] and done.stderr == ""


def test_interrupts_leave_the_storage_usable(tmp_path: Path) -> None:
    """At any moment of a search; a database that an interrupt left locked would not answer for a minute."""
    program = f"""
import random, signal, time
import optuna
from optuna.distributions import IntDistribution
from tuner.interrupts import keep_interrupts
from tuner.search.storage import abandon, open_storage

keep_interrupts()
signal.signal(signal.SIGVTALRM, lambda signum, frame: signal.raise_signal(signal.SIGINT))
rng, came, slowest = random.Random(0), 0, 0.0
study = optuna.create_study(storage=open_storage("sqlite:///{tmp_path}/study.db"))
for _ in range(120):
    opened = []
    signal.setitimer(signal.ITIMER_VIRTUAL, rng.uniform(0.001, 0.05))
    try:
        while True:
            opened.append(study.ask({{"x": IntDistribution(0, 100)}}))
            study.get_trials(deepcopy=False)
            if len(opened) > 3:
                study.tell(opened.pop(0), 1.0)
    except KeyboardInterrupt:
        came += 1
    start = time.monotonic()
    for trial in opened:
        abandon(study, trial.number, {{}}, retry=False)
    slowest = max(slowest, time.monotonic() - start)
print(came, slowest < 20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "120 True\n" and done.stderr == ""
