"""The verb ``doctor``: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option
from tuner.cli.output import console


@click.command("doctor", context_settings=CONTEXT_SETTINGS)
@debug_option
def command() -> None:
    """Check compiler, disassembler, GPU, packages and folders; say for each what was found and what to do.

    Always exits with 0: a machine without a GPU is fit for predicting, for example.
    """
    from tuner.doctor import diagnose
    from tuner.report import terminal

    console().print(terminal.findings(diagnose()))
