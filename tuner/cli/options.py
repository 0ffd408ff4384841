"""Options that several verbs share, and the checks that turn their text into values."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tuner.errors import TunerError, UsageError

if TYPE_CHECKING:
    from tuner.space import Problem
    from tuner.targets import Target
    from tuner.workload import Shape, Workload

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_FORMAT = "turboquant_4bit_nc"
DEFAULT_OUTPUT = Path("build/tables")
FALLBACK_ARCH = "sm_121"
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class NumberList(click.ParamType):
    """``1,2,4`` as a tuple of numbers in that order, each once. ``kind`` makes one of text, ``what`` names them."""

    name = "list"

    def __init__(self, kind: type[int] | type[float], what: str, example: str) -> None:
        self.kind, self.what, self.example = kind, what, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self.kind(part) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.what}: expected for example {self.example}", param, ctx)


INT_LIST = NumberList(int, "whole numbers", "1,2,4")
SHARE_LIST = NumberList(float, "shares", "0.1,0.2")


def debug_option(function: F) -> F:
    """``--debug``: read by ``tuner.cli.run`` from the arguments, so declared here only to be known and explained."""
    return click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error instead of one line."
    )(function)


def tensor_parallel_option(function: F) -> F:
    """``--tensor-parallel-size``: as ``ranks``."""
    return click.option(
        "--tensor-parallel-size", "-tp", "ranks", type=int, default=1, show_default=True, metavar="N",
        help="GPUs that vLLM will divide each layer's heads among: tables are for the heads of one.",
    )(function)  # fmt: skip


def problem_options(function: F) -> F:
    """What to compute and for which GPU: shared by the verbs that start from a head dim or a model."""
    for option in (
        click.option(
            "--arch", metavar="ARCH", help="Target, for example sm_90.  [default: the attached GPU's, else sm_121]"
        ),
        click.option(
            "--op", default="decode", show_default=True, metavar="OP", help="decode, dequant or store."
        ),
        click.option("--kv-heads", type=int, metavar="N", help="KV heads.  [default: usual for the head dim]"),
        click.option(
            "--gqa", type=int, metavar="N", help="Query heads per KV head.  [default: usual for the head dim]"
        ),
        click.option(
            "--kv-cache-dtype",
            "cache_format",
            default=DEFAULT_FORMAT,
            show_default=True,
            metavar="FORMAT",
            help="Format of the compressed cache, as vLLM names it.",
        ),
        click.option("--model", metavar="NAME|PATH", help="Preset, or a Hugging Face config.json: all its head dims."),
        click.option("--head-dim", type=int, metavar="D", help="64, 128, 256 or 512."),
    ):
        function = option(function)
    return function


def read_workload(head_dim: int | None, model: str | None, gqa: int | None, kv_heads: int | None) -> Workload:
    """The attention shapes asked for, by head dim or by model. Raises UsageError unless exactly one is given."""
    from tuner.workload import default_workload, load_model

    if (head_dim is None) == (model is None):
        given = "neither" if head_dim is None else "both"
        raise UsageError(f"{given} of --head-dim and --model given: expected one, for example --head-dim 256")
    if model is not None:
        if gqa is not None or kv_heads is not None:
            name = "--kv-heads" if gqa is None else "--gqa"
            raise UsageError(f"{name} does not go with --model: the model's configuration says it")
        return load_model(model)
    assert head_dim is not None
    return default_workload(head_dim, gqa, kv_heads)


def problem_of(shape: Shape, op: str, cache_format: str) -> Problem:
    """The problem that a kernel for ``shape`` solves; dequantisation and store know no group size."""
    from tuner.space import Problem

    return Problem(op, shape.head_dim, shape.gqa if op == "decode" else 1, cache_format)


def problems_of(workload: Workload, op: str, cache_format: str) -> dict[Problem, Shape]:
    """The distinct problems of ``workload`` with a shape of each. Raises UsageError where there is nothing to tune."""
    shapes = {problem_of(shape, op, cache_format): shape for shape, _ in workload.shapes if not shape.wants}
    if not shapes:
        wants = workload.shapes[0][0].wants
        raise UsageError(f"every layer of {workload.name} has {wants}, and those keep vLLM's own kernel")
    return shapes


def read_target(arch: str | None, device: int = 0) -> tuple[Target, str]:
    """The GPU to tune for and the evidence it allows: "measured" if it is attached, else "predicted"."""
    from tuner.targets import attached, get_target

    if arch is not None:
        get_target(arch)
    try:
        here = attached(device)
    except UsageError:
        if arch is None:
            raise
        here = None  # a GPU that nothing is known about does not keep others from being predicted
    if here is not None and arch in (None, here.arch):
        return here, "measured"
    return get_target(arch or FALLBACK_ARCH), "predicted"


def ensure_file(path: Path) -> Path:
    """``path``, a file that can be written, in a folder that is made if need be. Raises UsageError, TunerError."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: expected the name of a file")
    ensure_writable(path.parent)
    return path


def ensure_writable(folder: Path) -> Path:
    """``folder``, created if need be, with proof that files can be made there. Raises TunerError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TunerError(f"cannot write to {folder}: {error.strerror or error}; name another folder") from None
    return folder
