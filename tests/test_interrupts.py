"""An interrupt that arrives inside a callback, where Python ignores exceptions, still ends the program."""

import subprocess
import sys

import pytest

PROGRAM = """
import signal, time, weakref
from tuner.cli.interrupts import keep_interrupts

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


def test_other_ignored_exceptions_are_reported() -> None:
    program = """
from tuner.cli.interrupts import keep_interrupts
class Thing:
    def __del__(self): raise ValueError("seen")
keep_interrupts()
del (thing := [Thing()])[0]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ValueError: seen" in done.stderr
