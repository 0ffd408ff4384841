"""The verb ``space``: what would be searched, and what each constraint removes."""

from __future__ import annotations

from typing import Any

import click

from tuner.cli.options import CONTEXT_SETTINGS, debug_option, problem_options, problems_of, read_target, read_workload
from tuner.cli.output import console


@click.command("space", context_settings=CONTEXT_SETTINGS)
@problem_options
@debug_option
def command(
    head_dim: int | None, model: str | None, gqa: int | None, kv_heads: int | None, arch: str | None, **what: Any
) -> None:
    """Show the search space: its axes, how many configurations there are, and which constraint removes how many.

    Example: python tune.py space --head-dim 256 --arch sm_90
    """
    from tuner.report import terminal
    from tuner.search.constraints import space_for
    from tuner.space.census import census
    from tuner.targets import get_target

    workload = read_workload(head_dim, model, gqa, kv_heads)
    # Naming the architecture needs no look at the machine, which would load torch.
    target = get_target(arch) if arch else read_target(None)[0]
    out = console()
    for problem, shape in problems_of(workload, what["op"], what["cache_format"]).items():
        space = space_for(problem.op, shape.kv_heads)
        out.print(terminal.problem_title(problem, target.device_name, target.arch))
        out.print(terminal.axes(space))
        out.print(terminal.constraints(space, census(space, problem, target)))
