"""The command line: parses, calls one module per verb, turns every error into one line and an exit code.

Importing this package loads click and nothing heavy; a verb's own module is loaded when it is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from tuner.cli.group import cli
from tuner.errors import TunerError
from tuner.interrupts import keep_interrupts, let_go

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    keep_interrupts()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(run(args))
    finally:
        let_go()


def run(args: Sequence[str]) -> int:
    """Exit code of the command line ``args``. With ``--debug`` among them errors keep their traceback."""
    try:
        result = cli.main(args=list(args), prog_name=program_name(), standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted: what was built and measured is kept, the same command goes on from there")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left: nothing more to say, and the flush at exit must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in args:
            raise
        _say(f"error: {message_of(error)}")
        return exit_code_of(error)
    return result if isinstance(result, int) else 0


def program_name() -> str:
    """How the user called us: ``python tune.py`` in a checkout, else the console script."""
    return "python tune.py" if os.path.basename(sys.argv[0]) == "tune.py" else "wph-tune"


def exit_code_of(error: Exception) -> int:
    return error.exit_code if isinstance(error, TunerError | click.ClickException) else 1


def message_of(error: Exception) -> str:
    """One line for ``error``: our own and click's messages as they are, others with what kind of surprise it was."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else program_name()
        text = f"{error.format_message().rstrip('.')} (see {path} --help)"
    elif isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, TunerError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
    return " ".join(text.split())


def _say(line: str) -> None:
    print(line, file=sys.stderr)
