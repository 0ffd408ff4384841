"""Tables in narrow terminals: folded, then with fewer columns, never with a cell cut short."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from test_report import example

from tuner.report import terminal
from tuner.report.fitted import Column, Fitted

COLUMNS = (Column("batch"), Column("Triton shipped"), Column("splits", 2), Column("kernel", 1, "left"))
ROWS = (("128", "12.7 x", "132", "A"), None, ("1", "2.63 x", "16", "AA"))


def printed(renderable: object, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("width", [132, 100, 80])
def test_winners_keep_every_column_and_cell_down_to_80(width: int) -> None:
    text = printed(terminal.winners(example()), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "Not shown" not in text
    for cell in ("64k ragged", "predicted", "10.0 x", "80%", "batch", "splits", "kernel", "evidence", "shipped"):
        assert cell in text


def test_a_configuration_wraps_between_its_values() -> None:
    text = printed(terminal.kernels(example()), 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    words = {word for line in text.splitlines() for word in line.strip("│ ").replace("│", " ").split()}
    assert {f"{name}={value}" for name, value in example().kernels[0].params} <= words


def test_headings_fold_before_padding_and_columns_go() -> None:
    table = Fitted("t", "c.", COLUMNS, ROWS)
    wide = printed(table, 80)
    assert "Triton shipped" in wide and " 12.7 x " in wide
    width = max(len(line) for line in wide.splitlines() if "┃" in line)
    folded = printed(table, width - 1)
    assert "Triton shipped" not in folded and "shipped" in folded and " 12.7 x " in folded
    tight = printed(table, 29)
    assert "│ 12.7 x│" in tight and "splits" in tight
    assert "Not shown" not in tight


def test_columns_go_by_how_easily_they_are_spared_and_the_caption_says_so() -> None:
    table = Fitted("t", "c.", COLUMNS, ROWS)
    fewer = printed(table, 23)
    assert "splits" not in fewer.split("Not shown")[0] and "kernel" in fewer
    assert " ".join(fewer.split()).endswith("Not shown for want of width: splits.")
    least = printed(table, 17)
    assert " ".join(least.split()).endswith("Not shown for want of width: splits, kernel.")
    assert "12.7 x" in least and "128" in least
