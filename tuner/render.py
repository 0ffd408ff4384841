"""Configuration to CUDA source: deterministic, so that a hash of the code identifies the kernel."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import jinja2

from tuner import abi, formats
from tuner.errors import TunerError
from tuner.space import Config, Space, get_space
from tuner.space import dequant as dequant_space
from tuner.space import store as store_space
from tuner.space.plan import DecodePlan

_LINE_WIDTH = 120
_COMMENT = re.compile(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*')
"""A string literal, which is kept, or a comment."""
_UNTOLD = re.compile(r"""/\*|\bR"|'"'|\\\n|#include[^\n]*//""")
"""What that cannot tell from code: block comments, raw strings, a quoted quote, continued lines, slashes in paths."""


@dataclass(frozen=True)
class Source:
    """A rendered kernel."""

    config: Config
    text: str

    @cached_property
    def digest(self) -> str:
        """``code_digest(text)``."""
        return code_digest(self.text)


class _Choice(str):
    """An axis value inside a template; comparing it with something that the axis never takes is an error.

    Without this a typo in ``c.load == "blk"`` would quietly render the other branch.
    """

    axis: str
    known: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and str.__str__(other) not in self.known:
            raise TunerError(f"axis {self.axis} never is {other!r}: expected one of {', '.join(map(str, self.known))}")
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def code_digest(text: str) -> str:
    """SHA-256 of a source, in hex: of its header, which names every axis value, and of the rest without comments, empty
    lines and indentation. Better words make no other kernel. Raises TunerError where they could not be told from code.
    """
    if found := _UNTOLD.search(text):
        raise TunerError(f"a kernel's source has {found[0]!r}: expected comments that begin with // and plain strings")
    head, _, body = text.partition("\n\n") if text.startswith("//") else ("", "", text)
    lines = (line.strip() for line in _COMMENT.sub(lambda found: found[1] or "", body).splitlines())
    return hashlib.sha256("\n".join([head, *filter(None, lines)]).encode()).hexdigest()


def template_folder() -> Path:
    """Where the templates are: ``templates/`` of a checkout, else the copy that the wheel carries."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "templates"
    # A folder of that name beside an installed package is not ours: a checkout has its pyproject.toml there.
    return checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "templates"


def templates_digest(template_dir: Path | None = None) -> str:
    """SHA-256 over names and contents of all templates, in hex: the version of the generator."""
    folder = template_dir or template_folder()
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*.j2")):
        content = path.read_bytes()
        state.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def log2(n: int) -> int:
    """The exponent of ``n``; raises TunerError unless ``n`` is a power of two."""
    if n < 1 or n & (n - 1):
        raise TunerError(f"log2({n}): expected a power of two")
    return n.bit_length() - 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


def hex_literal(n: int, digits: int = 0) -> str:
    """``0x0fu``: an unsigned literal, padded with zeros to ``digits``."""
    return f"0x{n:0{digits}x}u"


def float_literal(x: float) -> str:
    """The shortest float literal that reads back as ``x``: ``0.125f``."""
    text = repr(float(x))
    if "n" in text:
        raise TunerError(f"{text} has no literal in C++")
    return f"{text}f"


def _fail(message: str) -> None:
    raise TunerError(message)


HELPERS: dict[str, Any] = {
    "log2": log2,
    "ceil_div": ceil_div,
    "round_up": round_up,
    "hex": hex_literal,
    "float": float_literal,
    "next_power_of_two": formats.next_power_of_two,
    "min": min,
    "max": max,
    "fail": _fail,
}
"""Functions that templates may call; those of one argument are filters too (``{{ n | log2 }}``)."""


@lru_cache(maxsize=8)
def environment(folder: Path) -> jinja2.Environment:
    """Templates of ``folder``, with HELPERS; a name that is not defined is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    made.globals.update(HELPERS)
    made.filters.update({n: HELPERS[n] for n in ("log2", "ceil_div", "round_up", "hex", "float")})
    return made


def format_source(text: str) -> str:
    """``text`` without trailing spaces and runs of blank lines, ending in one newline."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"


def header(config: Config) -> str:
    """The comment at the top of a source: what it computes, and every axis value but those of before a late axis."""
    p = config.problem
    lines = [f"// wph_{p.op}: head_dim {p.head_dim}, {p.gqa} query heads per KV head, {p.cache_format}"]
    line = "//"
    absent = {axis.name: axis.absent for axis in get_space(p.op).axes}
    for name, value in config.params:
        if value == absent[name]:
            continue
        word = f" {name}={value}"
        if len(line) + len(word) > _LINE_WIDTH:
            lines.append(line)
            line = "//"
        line += word
    return "\n".join([*lines, line]) + "\n\n"


class Axes(SimpleNamespace):
    """The axis values of a configuration as attributes: ``c`` of a template."""


def _choices(config: Config, space: Space) -> Axes:
    values: dict[str, Any] = {}
    for name, value in config.params:
        if isinstance(value, str):
            choice = _Choice(value)
            axis = space.axis(name)
            choice.axis, choice.known = name, axis.values
            values[name] = choice
        else:
            values[name] = value
    return Axes(**values)


def _context(config: Config) -> Mapping[str, Any]:
    """What a template sees: ``c`` axis values, ``p`` problem, ``layout``, ``params_struct``, ``plan`` or ``shape``."""
    p = config.problem
    context: dict[str, Any] = {
        "config": config,
        "c": _choices(config, get_space(p.op)),
        "p": p,
        "layout": p.layout,
        "params_struct": abi.c_struct(p.op),
    }
    if p.op == "decode":
        context["plan"] = DecodePlan(config)
    else:
        shape_of = {"dequant": dequant_space.shape, "store": store_space.shape}[p.op]
        context["shape"] = shape_of(config)
    return context


def _template_line(traceback: TracebackType | None, folder: Path) -> str | None:
    """``name:line`` of the innermost template frame: Jinja rewrites tracebacks to point into templates."""
    place = None
    while traceback:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if file.suffix == ".j2" and file.is_relative_to(folder):
            place = f"{file.relative_to(folder).as_posix()}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def primitives(config: Config) -> str:
    """The device primitives as they stand in ``render(config).text``, before the arguments' structure."""
    templates = environment(template_folder().resolve())
    return format_source(templates.get_template("parts/ptx.cuh.j2").render(_context(config)))


def render(config: Config, template_dir: Path | None = None) -> Source:
    """The CUDA source of ``config``, from ``wph_<op>.cu.j2`` (in ``template_dir`` where given).

    Raises UsageError for a bad axis value, TunerError naming template and line for a mistake in a template.
    """
    config = get_space(config.problem.op).validate(config)
    folder = (template_dir or template_folder()).resolve()
    name = f"wph_{config.problem.op}.cu.j2"
    try:
        body = environment(folder).get_template(name).render(_context(config))
    except jinja2.TemplateNotFound as e:
        raise TunerError(f"no template {e.name} in {folder}: expected it there") from None
    except jinja2.TemplateSyntaxError as e:
        raise TunerError(f"template {e.name}:{e.lineno}: {e.message}") from None
    except (jinja2.TemplateError, TunerError, ArithmeticError, LookupError, TypeError, ValueError) as e:
        place = _template_line(e.__traceback__, folder) or name
        raise TunerError(f"template {place}: {e}") from e
    text = format_source(header(config) + body)
    return Source(config, text)
