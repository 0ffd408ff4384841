"""Data races in the tables' kernels, looked for on the CPU: no GPU is needed.

    python benchmarks/races.py                          # the package's tables, eight minutes
    python benchmarks/races.py --tables build/tables

Every kernel of op decode runs twice in the emulator under the thread sanitizer, with two CTAs at a time and with one,
over requests of 0 to 300 tokens in ten splits. Ends with 1 where a race is found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import ended  # noqa: E402
from tests.emulated import emulate_decode  # noqa: E402
from tuner.emulate import EmulationError  # noqa: E402
from tuner.reference import synthetic_cache  # noqa: E402
from tuner.space import Config  # noqa: E402
from tuner.space.plan import DecodePlan  # noqa: E402
from tuner.table import read  # noqa: E402
from tuner.table.install import TABLE_PATTERN  # noqa: E402
from tuner.table.store import PACKAGE_TABLES  # noqa: E402

LENGTHS, SPLITS = (0, 1, 300, 17), 10
RUNS = ((1, 2), (2, 1))
"""Seed of the order of lanes, CTAs at a time."""


def race(config: Config, kv_heads: int, root: Path) -> str | None:
    """What the emulator finds in a kernel, None where that is nothing."""
    heads = kv_heads if DecodePlan(config).bulk else 2  # bulk copies want whole heads and aligned tokens
    problem = config.problem
    case = synthetic_cache(problem.layout, LENGTHS, q_heads=problem.gqa * heads, kv_heads=heads)
    try:
        for seed, ctas in RUNS:
            emulate_decode(config, case, SPLITS, seed=seed, concurrent_ctas=ctas, races=True, root=root)
    except EmulationError as error:
        return str(error)
    return None


def run(args: argparse.Namespace) -> int:
    clean = found = 0
    for path in sorted(args.tables.glob(TABLE_PATTERN)):
        table = read(path, cubins=False)
        for kernel in table.kernels if table.problem.op == "decode" else ():
            said = race(kernel.config(table.problem), table.kv_heads, args.root)
            clean, found = clean + (said is None), found + (said is not None)
            p = table.problem
            print(f"D={p.head_dim} group {p.gqa} {p.cache_format} {kernel.id}: {said or 'no race'}", flush=True)
    print(f"{clean} without a race, {found} with one")
    return 1 if found else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tables", type=Path, default=PACKAGE_TABLES, help="folder of tables (the package's)")
    made.add_argument("--root", type=Path, default=Path("build/emulate"), help="where emulated kernels are compiled")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
