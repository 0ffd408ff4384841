"""Imports go one way: the table of modules in docs/architecture.md is their order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tuner"


def order() -> dict[str, int]:
    """Module or package of ``tuner`` -> the row of the table that it stands in."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("## Modules")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}


def imported(path: Path) -> Iterator[str]:
    """Modules of ``tuner`` that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("tuner."))


def test_every_module_is_in_the_table() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert modules - {"__init__"} == order().keys()


def test_nothing_imports_from_a_row_below_its_own() -> None:
    rows = order()
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":  # hands out the names of ``api``
            continue
        found |= {(module, name) for name in imported(path) if rows.get(name, -1) > rows[module]}
    assert not found
