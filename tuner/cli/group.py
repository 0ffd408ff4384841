"""The group of verbs: an option where a verb could stand means the verb ``tune``; modules are loaded when needed."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import click

from tuner import __version__
from tuner.errors import UsageError

DEFAULT_VERB = "tune"
# Verb -> (module, line of help). The help stands here so that listing the verbs loads none of them.
VERBS: dict[str, tuple[str, str]] = {
    "tune": ("tune", "Search for the fastest kernels and write dispatch tables (what runs when no verb is given)."),
    "space": ("space", "Show the search space: axes, counts, and what each constraint removes."),
    "bench": ("bench", "Time attention over all layers of a model on the attached GPU."),
    "report": ("report", "Write dispatch tables as terminal tables or as one HTML page."),
    "explain": ("explain", "Say why a table picks its kernel for a batch and context."),
    "verify": ("verify", "Check tables and cubins: schema, hashes, architecture."),
    "export": ("export", "Copy tables, cubins and readable sources into a folder, or write a standalone project."),
    "install": ("install", "Put tables and cubins where vLLM finds them."),
    "doctor": ("doctor", "Check compiler, GPU, vLLM and tables, and say what is missing."),
}
EXAMPLES = """\
python tune.py --head-dim 256                        tune for the attached GPU (without one: predict for sm_121)
python tune.py --model gemma-4-31b                   every head dim of a model, from a preset ...
python tune.py --model path/to/config.json           ... or from a Hugging Face configuration
python tune.py --head-dim 128 --gqa 4 --trials 200   query heads per KV head; a longer search
python tune.py --head-dim 256 --op dequant --warps 1,2,4,8,16   compare CTA layouts of the dequantiser
python tune.py space --head-dim 256                  what would be searched, and what is ruled out and why
python tune.py install --dry-run                     what vLLM would be given
"""


class Verbs(click.Group):
    """A group that falls through to ``tune`` and imports a verb's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"tuner.cli.{VERBS[name][0]}").command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0].startswith("-"):
            # Only options: the verb tune, whose help is this group's own page.
            about = [arg for arg in args if arg in ("-h", "--help", "--version")]
            args = about[:1] or [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args[0] not in VERBS:
            raise UsageError(f"unknown verb {args[0]!r}: expected an option or one of {', '.join(VERBS)}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        tune = self.get_command(ctx, DEFAULT_VERB)
        assert tune is not None
        formatter.write_usage(ctx.command_path, "[OPTIONS] | VERB [OPTIONS]")
        formatter.write_paragraph()
        formatter.write_text(inspect.cleandoc(tune.help or ""))
        with formatter.section("Examples"):
            for line in EXAMPLES.splitlines():
                formatter.write(f"  {line}\n")
        tune.format_options(ctx, formatter)
        with formatter.section("Verbs (VERB --help tells more)"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])
        formatter.write_paragraph()
        formatter.write_text("Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (the same command resumes).")


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    no_args_is_help=False,
)
@click.version_option(__version__, prog_name="wph-tuner")
def cli() -> None:
    """Tune, inspect and install kernels."""
