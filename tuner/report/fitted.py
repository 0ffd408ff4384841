"""A table that fits the terminal: headings fold first, then the padding goes, then columns, and it says which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as Grid

_UNLIMITED = 10_000


@dataclass(frozen=True)
class Column:
    """``spare``: how easily it is spared, the largest number first; 0 is always shown."""

    name: str
    spare: int = 0
    justify: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Fitted:
    """``rows`` has a string per column, or None for a line between sections. No cell is ever cut to fit."""

    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str] | None]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for grid in self._versions():
            width = Measurement.get(console, options.update_width(_UNLIMITED), grid).maximum
            if width <= options.max_width:
                break
        yield grid

    def _versions(self) -> Iterator[Grid]:
        """The same table, narrower each time."""
        shown = list(range(len(self.columns)))
        yield self._grid(shown, fold=False, padding=1)
        yield self._grid(shown, fold=True, padding=1)
        yield self._grid(shown, fold=True, padding=0)
        for i in sorted(shown, key=lambda i: -self.columns[i].spare):
            if self.columns[i].spare:
                shown = [k for k in shown if k != i]
                yield self._grid(shown, fold=True, padding=0)

    def _grid(self, shown: list[int], *, fold: bool, padding: int) -> Grid:
        hidden = [column.name for i, column in enumerate(self.columns) if i not in shown]
        caption = self.caption
        if hidden:
            caption += f" Not shown for want of width: {', '.join(hidden)}."
        grid = Grid(
            title=self.title, title_justify="left", caption=caption, caption_justify="left", padding=(0, padding)
        )
        for i in shown:
            column = self.columns[i]
            name = column.name.replace(" ", "\n") if fold else column.name
            grid.add_column(name, justify=column.justify, no_wrap=True, overflow="fold")
        for row in self.rows:
            if row is None:
                grid.add_section()
            else:
                grid.add_row(*(row[i] for i in shown))
        return grid
