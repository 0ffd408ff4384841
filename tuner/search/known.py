"""What won before: the kernels of dispatch tables for the same problem, which a search tries first, with what replaced
values of theirs since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

from tuner.errors import TunerError
from tuner.space import Config, Problem, get_space
from tuner.table import find, read, table_file_name
from tuner.table.store import PACKAGE_TABLES


def winners_here(problem: Problem, device_name: str) -> tuple[Config, ...]:
    """Those of the table that serves ``device_name``, measured or predicted, the ones with most entries first."""
    path = find(problem, device_name)
    return () if path is None else tuple(dict.fromkeys(_winners(path, problem)))


def winners_elsewhere(problem: Problem, device_name: str) -> tuple[Config, ...]:
    """Those of the package's tables for other devices."""
    here = table_file_name(problem, device_name)
    before, after = here.partition("device_name=")[0], here.rpartition(",cache_dtype=")[2]
    tables = sorted(PACKAGE_TABLES.glob(f"{before}device_name=*,cache_dtype={after}"))
    return tuple(dict.fromkeys(c for path in tables if path.name != here for c in _winners(path, problem)))


def _winners(path: Path, problem: Problem) -> Iterator[Config]:
    """None of a table that is damaged or has values of an older space: no search fails for it. Of kernels to be tried
    in several ways every one's first way comes before any one's second, so that a short search has met all of them."""
    try:
        table = read(path, cubins=False)
    except TunerError:
        return
    served = Counter([e.kernel for e in table.by_batch] + [e.kernel for e in table.by_batch_and_context])
    ways: list[tuple[Config, ...]] = []
    for kernel in sorted(table.kernels, key=lambda k: -served[k.id]):
        with suppress(TunerError):
            ways.append(get_space(problem.op).renewed(kernel.config(problem)))
    for in_turn in zip_longest(*ways):
        yield from (config for config in in_turn if config is not None)
