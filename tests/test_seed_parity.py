"""The parity page names tests and commands that exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from tuner.cli.group import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "seed-parity.md").read_text()


def test_every_test_and_benchmark_on_the_page_exists() -> None:
    named = set(re.findall(r"((?:tests|benchmarks)/\w+\.py)(?:::(\w+))?", PAGE))
    assert len(named) > 25
    for path, function in sorted(named):
        assert (ROOT / path).is_file(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{path}::{function}"


def test_every_row_has_a_command_a_test_and_a_result() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 5 and row[0] not in ("---", "the seed")]
    assert len(rows) == 12
    for what, _, command, test, result in rows:
        assert "`python " in command and "tests/" in test and result.strip(), what


def test_the_command_line_has_every_option_on_the_page() -> None:
    commands = [c.split() for c in re.findall(r"`python tune\.py ([^`]+)`", PAGE)]
    assert len(commands) > 5
    for words in commands:
        verb, *rest = words if words[0] in VERBS else ["tune", *words]
        command = import_module(f"tuner.cli.{VERBS[verb][0] if verb in VERBS else 'tune'}").command
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
